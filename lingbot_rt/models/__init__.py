"""4. The networks: DiT, VAE and text encoder with their caches, and the loading of their weights.

Start with ``dit.CausalDiT.forward``. Nothing here knows of sessions or the engine.
"""
