"""What a session asks of the frames after decode: host data only, and the arithmetic of counts and sizes.

This module never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lingbot_rt.errors import InvalidInit
from lingbot_rt.shapes import FrameSize


@dataclass(frozen=True, slots=True)
class PostprocessPlan:
    """The same through a session; the defaults leave every frame as it is."""

    upscaling_scale: int = 1  # output side / decoded side, 1: off
    interpolation_exp: int = 0  # 2^exp times the frames, 0: off
    interpolation_scale: float = 1.0  # resolution at which motion is looked for, 1: the frames' own
    upscaling_model: Path | None = None  # None: the shipped network
    interpolation_model: Path | None = None

    @property
    def upscales(self) -> bool:
        return self.upscaling_scale > 1

    @property
    def interpolates(self) -> bool:
        return self.interpolation_exp > 0

    @property
    def rate(self) -> int:
        """Frames out a frame in, also the factor on the frame rate."""
        return 2**self.interpolation_exp

    def frames_out(self, frames_in: int, *, first: bool) -> int:
        """Frames that ``frames_in`` decoded ones become; the session's very first frame has no predecessor."""
        return self.rate * frames_in - (self.rate - 1 if first and frames_in > 0 else 0)

    def size_out(self, size: FrameSize) -> FrameSize:
        """Size of the frames that leave, for decoded frames of ``size``."""
        return FrameSize(size.width * self.upscaling_scale, size.height * self.upscaling_scale)


def client_model_path(given: str, model_dir: str | None, *, field: str) -> Path:
    """A model path out of an init -> a file inside ``model_dir`` (--postprocess-model-dir).

    Relative paths start there; links are followed before the check. Raises InvalidInit for an http(s) path, when no
    folder is set, when the path leads out of it (whether or not anything is there), and when no file is there.
    """
    if given.lower().startswith(("http://", "https://")):
        raise InvalidInit("must be a file under --postprocess-model-dir, not a URL", field=field)
    if model_dir is None:
        raise InvalidInit(
            "this server takes no model paths (it was started without --postprocess-model-dir)", field=field
        )
    folder = Path(model_dir).resolve()
    if "\0" in given:
        raise InvalidInit("is not a path", field=field)
    try:
        path = (folder / given).resolve()
        inside = path.is_relative_to(folder)
        found = inside and path.is_file()
    except (OSError, RuntimeError):  # a name too long for the system, a loop of links
        raise InvalidInit("is not a path", field=field) from None
    if not inside:
        raise InvalidInit("leads out of --postprocess-model-dir", field=field)
    if not found:
        raise InvalidInit(f"no file {given!r} in --postprocess-model-dir", field=field)
    return path
