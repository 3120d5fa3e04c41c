"""3. The chunk. Start with ``chunk_runner.run_chunk``: it is the whole computation on one page."""
