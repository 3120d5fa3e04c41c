"""The client's side of the wire protocol without a socket.

``ClientProtocol`` turns received messages into frames, statistics and errors. ``BaseSession`` turns method calls into
events; the blocking and the async session derive from it.
"""

from __future__ import annotations

import difflib
import io
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.client.camera_poses import poses_payload
from lingbot_rt.client.frames import Frame, FrameDecoder, Pixels
from lingbot_rt.client.start_picture import start_picture
from lingbot_rt.errors import (
    ClientError,
    EventRefused,
    InitRefused,
    KeyRefused,
    MessageRefused,
    ProtocolError,
    ServerBusy,
    ServerNotReady,
    SessionLost,
    one_line,
    quoted,
)
from lingbot_rt.session.messages import Init

CAMERA_ON: tuple[tuple[str, ...], ...] = ((),)
"""A script of one latent frame without keys. It turns camera control on from the first chunk."""

_KEPT_STATS = 1024
_KEPT_WARNINGS = 64
_NORMAL_CLOSE = 1000

Sent = TypeVar("Sent")


@dataclass(frozen=True, slots=True)
class ChunkStats:
    """A chunk's measurements in milliseconds; None where the server does not report one."""

    chunk_index: int
    num_frames: int
    event_id: int | None
    chunk_total_ms: float
    dit_ms: float | None
    vae_ms: float | None
    encode_ms: float | None
    window_frames: int | None
    message: dict[str, Any] = field(repr=False)  # the whole chunk_stats message

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> ChunkStats:
        known: dict[str, Any] = {name: message.get(name) for name in cls.__slots__ if name != "message"}
        for name, value in known.items():
            required = name in ("chunk_index", "num_frames", "chunk_total_ms")
            if required if value is None else not isinstance(value, int | float):
                problem = f"a {name} of type {type(value).__name__}" if name in message else f"no {name}"
                raise ProtocolError(f"chunk_stats has {problem}, expected a number")
        return cls(message=message, **known)

    @property
    def overhead_ms(self) -> float | None:
        """The least time of the chunk outside DiT and VAE: 0 if they overlap, with each other or with other chunks."""
        if self.dit_ms is None or self.vae_ms is None:
            return None
        return max(self.chunk_total_ms - self.dit_ms - self.vae_ms, 0.0)

    @property
    def overlaps(self) -> bool:
        """Whether DiT and VAE took longer than the chunk. They then ran at the same time, or beside another chunk."""
        return (self.dit_ms or 0) + (self.vae_ms or 0) > self.chunk_total_ms


class ClientProtocol:
    """Takes every received message in order. Holds at most one frame header whose payload has not arrived."""

    def __init__(self) -> None:
        self.stats: deque[ChunkStats] = deque(maxlen=_KEPT_STATS)
        self.warnings: deque[str] = deque(maxlen=_KEPT_WARNINGS)
        self._decoder = FrameDecoder()
        self._header: dict[str, Any] | None = None
        self._closing_error: str | None = None

    def receive(self, message: bytes | str) -> list[Frame]:
        """One WebSocket message -> the frames it completes. Raises ClientError for the server's error messages."""
        if isinstance(message, str):
            raise ProtocolError("the server sent text where MessagePack was expected")
        if self._header is not None:
            header, self._header = self._header, None
            return self._decoder.decode(header, message)
        fields = _unpack(message)
        match fields.get("type"):
            case "frame_batch":
                return self._decoder.decode(fields, fields.get("payload", b""))
            case "frame_batch_header":
                self._header = fields
            case "chunk_stats":
                self.stats.append(ChunkStats.from_message(fields))
            case "warning":
                self.warnings.append(f"{fields.get('field', '')}: {fields.get('content', '')}")
            case "error":
                self._raise(str(fields.get("content", "")), fields.get("code"))
            case _:
                pass  # a message type of a later server
        return []

    def closed(self, code: int | None, reason: str) -> None:
        """Call once the connection is closed. Raises SessionLost with the server's last error after an abnormal end."""
        if code != _NORMAL_CLOSE:
            cause = self._closing_error or reason or "the connection broke"
            raise SessionLost(f"session lost: {cause}", close_code=code)

    def _raise(self, content: str, code: str | None) -> None:
        kinds: list[tuple[str, type[ClientError]]] = [
            ("another realtime session", ServerBusy),
            ("the server is not ready", ServerNotReady),
            ("invalid generate request", InitRefused),
            ("invalid event", EventRefused),
            ("a valid API key is needed", KeyRefused),
            ("the message is larger than", MessageRefused),
        ]
        for start, kind in kinds:
            if content.startswith(start) or code == kind.code:
                raise kind(content)
        # The server closes after any other error. ``closed`` then raises it.
        self._closing_error = content


class BaseSession(ABC, Generic[Sent]):
    """What the blocking and the async session share: events and statistics.

    Each method below sends one event and returns its id: ``Sent`` is ``int`` in a blocking session and an awaitable of
    it in an async one. The id comes back in ``Frame.event_id``. Keys are w a s d to move and i j k l to look.
    """

    def __init__(self) -> None:
        self._protocol = ClientProtocol()
        self._decoded: deque[Frame] = deque()  # frames of the last batch that were not returned yet
        self._held: tuple[str, ...] = ()
        self._event_id = 0

    @property
    def stats(self) -> deque[ChunkStats]:
        """Statistics of the last 1,024 chunks. A chunk's statistics arrive after its frames."""
        return self._protocol.stats

    @property
    def warnings(self) -> deque[str]:
        """The newest 64 warnings of the server, for a session whose init names the extension ``warning``."""
        return self._protocol.warnings

    @abstractmethod
    def _send(self, message: bytes, event_id: int) -> Sent: ...

    def press(self, *keys: str) -> Sent:
        """Hold ``keys`` in addition to the keys already held."""
        return self.hold(*self._held, *keys)

    def release(self, *keys: str) -> Sent:
        """Let go of ``keys``, or of all keys if none is given."""
        return self.hold(*(key for key in self._held if keys and key not in keys))

    def hold(self, *keys: str) -> Sent:
        """Hold exactly ``keys`` from now on."""
        self._held = tuple(dict.fromkeys(keys))
        transition = {"actions": list(self._held), "client_ts_ms": time.time() * 1000}
        return self._event("camera_actions", {"mode": "state", "transitions": [transition]})

    def script(self, actions: Sequence[Sequence[str]]) -> Sent:
        """Play ``actions`` instead of held keys: one list of keys per latent frame (four pixel frames)."""
        self._held = ()
        return self._event("camera_actions", [list(keys) for keys in actions])

    def follow(self, poses: npt.ArrayLike, intrinsics: npt.ArrayLike | None = None, **options: Any) -> Sent:
        """Move the camera along ``poses`` instead of by keys: c2w [n, 4, 4], one per pixel frame.

        ``intrinsics`` and ``options`` (size, anchor, every) are those of ``poses_payload``. Keys go on from the last
        pose. Raises EventRefused for what a server would refuse.
        """
        payload = poses_payload(poses, intrinsics, **options)
        self._held = ()
        return self._event("camera_poses", payload)

    def prompt(self, text: str, *, recache: bool | None = None) -> Sent:
        """Change the prompt from the next chunk on.

        ``recache``: whether the server computes its window again for it; None is what the init said.
        """
        return self._event("prompt", text if recache is None else {"prompt": text, "recache": recache})

    def _event(self, kind: str, payload: object) -> Sent:
        self._event_id += 1
        event = {"type": "event", "kind": kind, "event_id": self._event_id, "payload": payload}
        return self._send(msgspec.msgpack.encode(event), self._event_id)


def init_fields(
    prompt: str | None = None,
    first_frame: bytes | str | Path | Pixels | None = None,
    script: Sequence[Sequence[str]] | None = CAMERA_ON,
    **fields: object,
) -> dict[str, object]:
    """The fields of an init message.

    ``first_frame``: an encoded picture, the path of one, a ``data:`` or http(s) URL that the server resolves, or
    pixels uint8 [H, W, 3]; None is the picture that the package brings. ``script``: keys of the first latent frames;
    None leaves camera control off until the first key event. ``fields``: other fields of the init, such as
    ``size="832x480"``, ``seed=1``, ``realtime_output_format="jpeg"``; None leaves a field out.
    Raises InitRefused for a field that no init has, and for a missing prompt.
    """
    for name in fields:
        if name not in Init.__struct_fields__:
            hint = nearest_hint(name, also=("api_key", "script"))
            raise InitRefused(f"{quoted(name)}: an init has no such field{hint}", field=name)
    if prompt is None:
        raise InitRefused("prompt: missing, expected a sentence that describes the world", field="prompt")
    message: dict[str, object] = {"type": "init", "prompt": prompt, "first_frame": _picture(first_frame)}
    if script is not None:
        message["condition_inputs"] = {"camera_actions": [list(keys) for keys in script]}
    return message | {name: value for name, value in fields.items() if value is not None}


def init_message(*values: Any, **fields: Any) -> bytes:
    """The init message of ``init_fields``, encoded."""
    return msgspec.msgpack.encode(init_fields(*values, **fields))


def nearest_hint(name: str, also: Sequence[str] = ()) -> str:
    """``"; the nearest is size"`` after a misspelt name: a field of the init or one of ``also``. Empty if none is.

    ``steps`` is nearest to ``num_inference_steps``, which contains it.
    """
    known = [*Init.__struct_fields__, *also]
    found = difflib.get_close_matches(name, known, n=1) or [each for each in known if name.lower() in each]
    return f"; the nearest is {found[0]}" if found else ""


def _unpack(message: bytes) -> dict[str, Any]:
    try:
        return msgspec.msgpack.decode(message, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError, TypeError) as error:
        raise ProtocolError(f"a message of {len(message)} bytes is not a MessagePack map: {one_line(error)}") from None


def _picture(first_frame: bytes | str | Path | Pixels | None) -> bytes | str:
    if first_frame is None:
        return start_picture()
    if isinstance(first_frame, np.ndarray):
        png = io.BytesIO()
        Image.fromarray(first_frame).save(png, "PNG")
        return png.getvalue()
    if isinstance(first_frame, bytes):
        return first_frame
    if isinstance(first_frame, str) and first_frame.startswith(("data:", "http://", "https://")):
        return first_frame
    return Path(first_frame).read_bytes()
