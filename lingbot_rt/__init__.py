"""lingbot_rt: a picture, a sentence and held keys become a world that moves, as a live video stream.

Reading order, the life of one chunk:

1. ``server/``     a client message comes in over a socket
2. ``session/``    it changes what the session is; the session gives the plan of its next chunk, a frozen ``ChunkPlan``
3. ``engine/``     one thread that owns the device runs the plan
4. ``models/``     the networks: causal DiT with KV cache, causal VAE, UMT5
5. ``transport/``  pixels become frame batches and leave

``client/`` is the other end of the wire. ``config.py``, ``errors.py`` and ``shapes.py`` are shared by all folders.
"""

import os

# OpenMP's threads spin while they wait. On a machine where anything else runs (the browser that shows the stream, for
# one) a spinning thread keeps the working one off its core, and a chunk takes 10 to 40 times as long. torch reads this
# once, when it is first imported, so it is set here, before any module of the package can import torch.
if not os.environ.get("OMP_WAIT_POLICY", "").strip():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

__version__ = "0.1.0"
