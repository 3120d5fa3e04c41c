"""The key vocabulary: w a s d move the camera, i j k l turn it."""

from __future__ import annotations

TOKENS = ("w", "a", "s", "d", "i", "j", "k", "l")

Keys = tuple[str, ...]
"""Keys held together."""

Actions = tuple[Keys, ...]
"""The keys of consecutive latent frames."""

NEUTRAL: Keys = ()
