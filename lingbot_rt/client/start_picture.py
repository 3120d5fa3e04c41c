"""The picture that a session starts from when nobody names another one: the first preset of the page."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "webui" / "presets", _PACKAGE.parent / "webui" / "presets")  # in a wheel, in a checkout
_NAME = "village.webp"


def start_picture() -> bytes:
    """The bytes of a WebP picture."""
    folder = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    return (folder / _NAME).read_bytes()
