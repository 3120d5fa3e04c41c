"""3. The engine: one thread owns the device. ``chunk_runner.run_chunk`` has the whole computation on one page."""
