"""3. The chunk. Start with ``chunk_runner.run_chunk``: it is the whole computation on one page."""

import os

# OpenMP's threads spin while they wait. On a machine where anything else runs (the browser that shows the stream, for
# one) a spinning thread keeps the working one off its core, and a chunk takes 10 to 40 times as long. Read once, when
# torch is first imported, which is after this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
