"""An init, the model and the server's configuration -> the checked settings of a session. Errors name the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lingbot_rt.config import FormatName, ServeConfig
from lingbot_rt.errors import InvalidEvent, InvalidInit
from lingbot_rt.session.camera_poses import Notice, parse_poses
from lingbot_rt.session.controls import MAX_PENDING, ControlEvent, Moves, parse_event, parse_script
from lingbot_rt.session.interactive_window import recent_frames
from lingbot_rt.session.messages import Init, Resume
from lingbot_rt.session.plan import ModelInfo, PostprocessPlan, SessionPlan
from lingbot_rt.session.shown import shown
from lingbot_rt.shapes import FrameSize, latent_frames_for

MAX_PICTURE_SIDE = {"webp": 16383, "jpeg": 65500}
"""Largest width and height of a picture in pixels, by the format's own definition or its encoder's."""

ENCODED_FRAMES_PER_BATCH = 6
RAW_FRAMES_PER_BATCH = 16

MIN_SIDE = 64
"""Smallest width and height of a session in pixels."""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How the frames of a session are sent."""

    name: FormatName
    quality: int | None = None  # 1 to 100 for webp and jpeg; None: the default of the format
    preview_max_width: int | None = None  # wider webp and jpeg pictures are shrunk to this many pixels

    @property
    def is_encoded(self) -> bool:
        """Whether each frame is sent as a picture file."""
        return self.name in ("webp", "jpeg")

    @property
    def frames_per_batch(self) -> int:
        """Largest number of frames per batch."""
        return ENCODED_FRAMES_PER_BATCH if self.is_encoded else RAW_FRAMES_PER_BATCH


def preview_size(width: int, height: int, max_width: int | None) -> tuple[int, int]:
    """(width, height) of the pictures sent: at most ``max_width`` wide, with the aspect kept, never enlarged."""
    if not max_width or max_width >= width:
        return width, height
    return max_width, max(1, round(height * max_width / width))


@dataclass(frozen=True, slots=True)
class PinnedControl:
    """A parsed event of an init."""

    events: tuple[ControlEvent, ...]
    event_id: int | None


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What an init fixes for the whole session, checked and completed with the model's defaults."""

    prompt: str
    negative_prompt: str
    size: FrameSize
    fps: float
    latent_frames: int
    seed: int
    num_steps: int
    guidance_scale: float
    sink_frames: int
    window_frames: int
    max_chunks: int | None
    script: Moves | None  # keys or poses of the first latent frames
    output: OutputFormat
    pacing: bool
    profile: bool
    extensions: frozenset[str]
    postprocess: PostprocessPlan
    pinned: Mapping[int, Sequence[PinnedControl]]  # chunk index -> events that this chunk samples
    pause_limit_s: float  # longest pause
    notices: tuple[Notice, ...] = ()  # what of the init was taken, but not as it stands
    bfloat16_vae: bool = False
    recache: bool = False  # the window is computed again for every new prompt
    recent_frames: tuple[int, ...] = ()  # of the interactive window: (still, moving); empty: it is off
    keeps_history: bool = False  # chunks are kept that the session can go back to

    @property
    def playback_fps(self) -> float:
        """Frames per second sent with pacing, interpolated frames included."""
        return self.fps * self.postprocess.rate

    def session_plan(self, session_id: str, first_frame: npt.NDArray[np.uint8]) -> SessionPlan:
        return SessionPlan(
            session_id=session_id,
            prompt=self.prompt,
            first_frame=first_frame,
            size=self.size,
            latent_frames=self.latent_frames,
            seed=self.seed,
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            sink_frames=self.sink_frames,
            window_frames=self.window_frames,
            postprocess=self.postprocess,
            bfloat16_vae=self.bfloat16_vae,
            recent_frames=self.recent_frames,
        )


def resolve(init: Init, info: ModelInfo, config: ServeConfig) -> SessionSettings:
    """Raises InvalidInit that names the field, the value and what is expected."""
    if init.model not in ("", info.model_id):
        raise InvalidInit(f"{shown(init.model)} is not served here, expected {info.model_id!r}", field="model")
    if not init.prompt.strip():
        raise InvalidInit(
            f"{shown(init.prompt)} is only white space, expected a sentence that describes the world", field="prompt"
        )
    size = _size(init.size, config.max_pixels)
    postprocess = _postprocess(init, config.postprocess_model_dir)
    output = OutputFormat(
        name=init.realtime_output_format or cast(FormatName, config.default_output_format),
        quality=init.output_compression,
        preview_max_width=init.realtime_preview_max_width,
    )
    _check_pictures(output, size, postprocess)
    latent_frames = latent_frames_for(init.num_frames)
    sink_frames, window_frames = _window(init, info, latent_frames)
    script, notices = _script(init)
    asked = init.interactive_kv_window
    is_interactive = config.interactive_kv_window if asked is None else asked
    return SessionSettings(
        prompt=init.prompt,
        negative_prompt=init.negative_prompt,
        size=size,
        fps=init.fps,
        latent_frames=latent_frames,
        seed=init.seed,
        num_steps=init.num_inference_steps or info.num_steps,
        guidance_scale=max(init.guidance_scale, 1.0),
        sink_frames=sink_frames,
        window_frames=window_frames,
        max_chunks=init.max_chunks,
        script=script,
        output=output,
        pacing=init.realtime_output_pacing,
        profile=init.profile,
        extensions=frozenset(init.protocol_extensions),
        pinned=_pinned(init),
        postprocess=postprocess,
        pause_limit_s=config.pause_limit_s,
        notices=notices,
        bfloat16_vae=init.quality == "high",
        recache=init.recache,
        recent_frames=recent_frames(sink_frames, window_frames, latent_frames) if is_interactive else (),
        keeps_history=config.history_mb > 0,
    )


def rejoined(settings: SessionSettings, resume: Resume, next_index: int) -> SessionSettings:
    """``settings`` with what ``resume`` says of how the session is sent; ``max_chunks`` counts from ``next_index``.

    Raises InvalidInit for pictures that are larger than their format.
    """
    output = settings.output
    output = OutputFormat(
        name=output.name if resume.realtime_output_format is None else resume.realtime_output_format,
        quality=_given(resume.output_compression, output.quality),
        preview_max_width=_given(resume.realtime_preview_max_width, output.preview_max_width),
    )
    _check_pictures(output, settings.size, settings.postprocess)
    listed = resume.protocol_extensions
    return replace(
        settings,
        output=output,
        pacing=settings.pacing if resume.realtime_output_pacing is None else resume.realtime_output_pacing,
        profile=settings.profile if resume.profile is None else resume.profile,
        max_chunks=settings.max_chunks if resume.max_chunks is None else next_index + resume.max_chunks,
        extensions=settings.extensions if listed is None else frozenset(listed),
    )


def _given(value: int | None, otherwise: int | None) -> int | None:
    return otherwise if value is None else value


def _size(text: str, max_pixels: int) -> FrameSize:
    try:
        size = FrameSize.parse(text)
    except ValueError as error:
        raise InvalidInit(str(error), field="size") from None
    nearest = size.nearest_valid(MIN_SIDE, max_pixels)
    if not size.is_whole_tokens:
        problem = "is not a multiple of 16"
    elif min(size.width, size.height) < MIN_SIDE:
        problem = f"is below {MIN_SIDE} pixels a side"
    elif size.pixels > max_pixels:
        problem = f"has more than {max_pixels} pixels (--max-pixels)"
    else:
        return size
    raise InvalidInit(f"{size} {problem}, nearest valid {nearest}", field="size")


def _check_pictures(output: OutputFormat, size: FrameSize, postprocess: PostprocessPlan) -> None:
    """Refuses frames that their format cannot hold: the session would break with its first chunk."""
    limit = MAX_PICTURE_SIDE.get(output.name)
    made = postprocess.size_out(size)
    sent = FrameSize(*preview_size(made.width, made.height, output.preview_max_width))
    if limit is None or max(sent.width, sent.height) <= limit:
        return
    how = f" upscaled by {postprocess.upscaling_scale}" if postprocess.upscales else ""
    raise InvalidInit(
        f"{size}{how} gives pictures of {sent}, {output.name} has at most {limit} pixels a side; expected a smaller "
        "size, realtime_preview_max_width, or the realtime_output_format raw or delta-gzip",
        field="size",
    )


def _window(init: Init, info: ModelInfo, latent_frames: int) -> tuple[int, int]:
    """(sink, window) in latent frames. The default window grows if the sink and a chunk need more."""
    sink = info.sink_frames if init.realtime_causal_sink_size is None else init.realtime_causal_sink_size
    needed = sink + latent_frames
    window = init.realtime_causal_kv_cache_num_frames
    if window is None:
        return sink, max(info.window_frames, needed)
    if window < needed:
        raise InvalidInit(
            f"{window} is smaller than the sink of {sink} and a chunk of {latent_frames}, expected at least {needed}",
            field="realtime_causal_kv_cache_num_frames",
        )
    return sink, window


def _script(init: Init) -> tuple[Moves | None, tuple[Notice, ...]]:
    """The keys or poses of the first latent frames, None if there are none, and what the client should hear of them."""
    given = init.condition_inputs or {}
    script, poses = given.get("camera_actions"), given.get("camera_poses")
    if script is not None and poses is not None:
        raise InvalidInit(
            "both camera_actions and camera_poses, expected one of them: each replaces the other",
            field="condition_inputs",
        )
    try:
        if poses is not None:
            path = parse_poses(poses, MAX_PENDING, "condition_inputs.camera_poses")
            return path.moves, path.notices
        return (None if script is None else parse_script(script, "condition_inputs.camera_actions")), ()
    except InvalidEvent as error:
        raise InvalidInit(str(error), field=error.field) from None


def _postprocess(init: Init, model_dir: str | None) -> PostprocessPlan:
    """Fields of an upscaling or interpolation that is off are ignored."""

    def model(given: str | None, field: str) -> Path | None:
        return client_model_path(given, model_dir, field=field) if given else None

    asked: dict[str, Any] = {}
    if init.enable_upscaling:
        asked["upscaling_scale"] = init.upscaling_scale
        asked["upscaling_model"] = model(init.upscaling_model_path, "upscaling_model_path")
        asked["upscaling_given"] = init.upscaling_model_path or ""
    if init.enable_frame_interpolation:
        asked["interpolation_exp"] = init.frame_interpolation_exp
        asked["interpolation_scale"] = init.frame_interpolation_scale
        path = init.frame_interpolation_model_path
        asked["interpolation_model"] = model(path, "frame_interpolation_model_path")
        asked["interpolation_given"] = path or ""
    return PostprocessPlan(**asked)


def _pinned(init: Init) -> dict[int, list[PinnedControl]]:
    """Pinned events by chunk index. They are checked now, because later errors would reach no client."""
    if not init.pinned_events:
        return {}
    if "pinned_events" not in init.protocol_extensions:
        raise InvalidInit('needs "pinned_events" in protocol_extensions', field="pinned_events")
    pinned: dict[int, list[PinnedControl]] = {}
    for number, entry in enumerate(init.pinned_events):
        try:
            events = parse_event(entry.kind, entry.payload)
        except InvalidEvent as error:
            raise InvalidInit(str(error), field=f"pinned_events[{number}].{error.field}") from None
        pinned.setdefault(entry.chunk, []).append(PinnedControl(events, entry.event_id))
    return pinned


def client_model_path(given: str, model_dir: str | None, *, field: str) -> Path:
    """The model path of an init -> a file inside ``model_dir`` (--postprocess-model-dir).

    Relative paths start in ``model_dir``. Links are followed before the check. Raises InvalidInit for a URL, if
    ``model_dir`` is None, if the path leads out of the folder (even to nothing), and if there is no such file.
    """
    if given.lower().startswith(("http://", "https://")):
        raise InvalidInit(f"{shown(given)}, expected a file under --postprocess-model-dir, not a URL", field=field)
    if model_dir is None:
        raise InvalidInit(
            f"{shown(given)}, but this server takes no model paths (it was started without --postprocess-model-dir)",
            field=field,
        )
    folder = Path(model_dir).resolve()
    if "\0" in given:
        raise InvalidInit(f"{shown(given)} is not a path, expected a file in --postprocess-model-dir", field=field)
    try:
        path = (folder / given).resolve()
        inside = path.is_relative_to(folder)
        found = inside and path.is_file()
    except (OSError, RuntimeError):  # a name too long for the system, a loop of links
        raise InvalidInit(
            f"{shown(given)} is not a path, expected a file in --postprocess-model-dir", field=field
        ) from None
    if not inside:
        raise InvalidInit(f"{shown(given)} leads out of --postprocess-model-dir", field=field)
    if not found:
        raise InvalidInit(f"no file {shown(given)} in --postprocess-model-dir", field=field)
    return path
