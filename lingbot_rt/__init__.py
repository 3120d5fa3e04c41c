"""lingbot_rt: a picture, a sentence and held keys become a world that moves, as a live video stream.

Reading order, the life of one chunk:

1. ``server/``     a client message comes in
2. ``control/``    it becomes held keys, scripts and prompts, and those become camera poses
3. ``engine/``     they are sampled as late as possible into a frozen ``ChunkPlan`` and run
4. ``models/``     the networks: causal DiT with KV cache, causal VAE, UMT5
5. ``transport/``  pixels become frame batches and leave

``client/`` is the other end of the wire. ``config.py``, ``errors.py`` and ``shapes.py`` are shared by all rooms.
"""

__version__ = "0.1.0"
