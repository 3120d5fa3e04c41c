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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from lingbot_rt.client.camera_poses import poses_payload
from lingbot_rt.client.frames import Frame, FrameDecoder, Pixels
from lingbot_rt.client.kept import EventsInFlight, Place, ReceivedFrames, SavedWorld, world_of
from lingbot_rt.client.start_picture import start_picture
from lingbot_rt.errors import (
    ClientError,
    EventRefused,
    InitRefused,
    KeyRefused,
    MessageRefused,
    ProtocolError,
    SaveFailed,
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
_KEPT_PLACES = 64
_NORMAL_CLOSE = 1000
_SHUT_DOWN_CLOSE = 1001  # the next start of the server may go on with the session
_SAVE_CHUNKS = 16  # a world comes at the end of the chunk in work, or of the one after

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
    kept_from: int | None = None  # the first chunk that ``rewind`` can go back to; None: the server keeps none
    branch: int | None = None

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


class SessionEnded(Exception):
    """The session is over, as it should be."""


class ClientProtocol:
    """Takes every received message in order. Holds at most one frame header whose payload has not arrived."""

    def __init__(self) -> None:
        self.stats: deque[ChunkStats] = deque(maxlen=_KEPT_STATS)
        self.warnings: deque[str] = deque(maxlen=_KEPT_WARNINGS)
        self.rewinds: deque[Place] = deque(maxlen=_KEPT_PLACES)
        self.resumes: deque[Place] = deque(maxlen=_KEPT_PLACES)
        self.events = EventsInFlight()
        self.token: str | None = None  # with which the session goes on after a lost line
        self.resume_s = 0.0  # for so long the server keeps it
        self.has_opened = False  # a ``session`` message came on this line
        self._extensions: list[str] = []  # of the session, as the server says
        self._received = ReceivedFrames()
        self._saves: dict[int, SavedWorld | ClientError | None] = {}  # by event id; None: no answer yet
        self._chunks = 0
        self._decoder = FrameDecoder()
        self._header: dict[str, Any] | None = None
        self._closing_error: str | None = None

    def receive(self, message: bytes | str) -> list[Frame]:
        """One WebSocket message -> the frames it completes. Raises ClientError for the server's error messages."""
        if isinstance(message, str):
            raise ProtocolError("the server sent text where MessagePack was expected")
        if self._header is not None:
            header, self._header = self._header, None
            return self._decode(header, message)
        fields = _unpack(message)
        match fields.get("type"):
            case "frame_batch":
                return self._decode(fields, fields.get("payload", b""))
            case "frame_batch_header":
                self._header = fields
            case "chunk_stats":
                self.stats.append(ChunkStats.from_message(fields))
                self._chunks += 1
            case "warning":
                self.warnings.append(f"{fields.get('field', '')}: {fields.get('content', '')}")
            case "control_ack":
                self._acknowledged(fields)
            case "session":
                self._opened(fields)
            case "rewound":
                self._rewound(fields)
            case "world":
                self._answer(fields.get("event_id"), world_of(fields))
            case "error":
                self._raise(str(fields.get("content", "")), fields.get("code"), fields.get("event_id"))
            case _:
                pass  # a message type of a later server
        return []

    def closed(self, code: int | None, reason: str) -> None:
        """Call once the connection is closed. Raises SessionLost with the server's last error after an abnormal end."""
        if code != _NORMAL_CLOSE:
            cause = self._closing_error or reason or "the connection broke"
            raise SessionLost(f"session lost: {cause}", close_code=code)

    def can_resume(self, code: int | None) -> bool:
        """Whether the server may go on with the session after this end of the connection.

        It sends an error before it ends a session itself: then only its own shutdown leaves one to go on with.
        """
        if self.token is None or code == _NORMAL_CLOSE:
            return False
        return self._closing_error is None or code == _SHUT_DOWN_CLOSE

    def require_resumable(self, code: int | None, reason: str) -> None:
        """Raises SessionEnded or SessionLost after an end that leaves nothing to go on with."""
        if not self.can_resume(code):
            self.closed(code, reason)
            raise SessionEnded

    def resume_message(self) -> bytes:
        """The init that goes on with the session on a new line, which begins here. It waits in line for its turn."""
        self._header = self._closing_error = None
        self.has_opened = False
        self._decoder.forget_reference()
        message: dict[str, Any] = {"type": "init", "resume": self.token} | self._received.fields()
        if self._extensions:
            message["protocol_extensions"] = list(dict.fromkeys([*self._extensions, "queue"]))
        return msgspec.msgpack.encode(message)

    def expect_world(self, event_id: int) -> Callable[[], bool]:
        """Says whether the answer to the ``save`` with this id has come, or so many chunks that none will."""
        self._saves[event_id] = None
        limit = self._chunks + _SAVE_CHUNKS
        return lambda: self._saves[event_id] is not None or self._chunks >= limit

    def take_world(self, event_id: int) -> SavedWorld:
        """The answer. Raises ClientError for a refusal and for none."""
        answer = self._saves.pop(event_id)
        if answer is None:
            self.events.answered(event_id)
            raise SaveFailed("save: the server did not answer with the world")
        if isinstance(answer, ClientError):
            raise answer
        return answer

    def _decode(self, header: dict[str, Any], payload: bytes) -> list[Frame]:
        frames = self._decoder.decode(header, payload)
        if frames:
            self._received.add(frames[0].chunk_index, len(frames))
        return frames

    def _acknowledged(self, fields: dict[str, Any]) -> None:
        event_id = fields.get("event_id")
        if not isinstance(event_id, int):
            return
        if fields.get("state") == "received":
            self.events.received(event_id)
        elif fields.get("state") == "dropped":
            self.events.answered(event_id)
            if event_id in self._saves and self._saves[event_id] is None:
                self._saves[event_id] = SaveFailed(
                    "save: the server dropped it, for a newer one or for an error before"
                )

    def _opened(self, fields: dict[str, Any]) -> None:
        self.has_opened = True
        token, resume_s = fields.get("resume_token"), fields.get("resume_s")
        if isinstance(token, str) and isinstance(resume_s, int | float):
            self.token, self.resume_s = token, float(resume_s)
        capabilities = fields.get("capabilities")
        named = capabilities.get("extensions") if isinstance(capabilities, dict) else None
        self._extensions = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        if fields.get("resumed") is True:
            place = _place(fields)
            self.resumes.append(place)
            if place.chunk_index is not None:
                self._received.resumed_at(place.chunk_index)

    def _rewound(self, fields: dict[str, Any]) -> None:
        place = _place(fields)
        self.rewinds.append(place)
        if place.chunk_index is not None:
            self._received.went_on_at(place.chunk_index)
        event_id = fields.get("event_id")
        if isinstance(event_id, int):
            self.events.answered(event_id)

    def _answer(self, event_id: Any, answer: SavedWorld | ClientError) -> bool:
        """Whether a ``save`` waits for it."""
        if not isinstance(event_id, int):
            return False
        self.events.answered(event_id)
        if event_id not in self._saves:
            return False
        self._saves[event_id] = answer
        return True

    def _raise(self, content: str, code: str | None, event_id: object) -> None:
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
                error = kind(content)
                if kind is EventRefused and self._answer(self.events.refused(event_id), error):
                    return
                raise error
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

    @property
    def resume_token(self) -> str | None:
        """What ``connect(url, resume=...)`` goes on with after this line is lost; None if the server keeps no worlds.

        The session itself comes back with it as long as it is iterated.
        """
        return self._protocol.token

    @property
    def resumes(self) -> deque[Place]:
        """Where the session went on after a lost line, the newest 64."""
        return self._protocol.resumes

    @property
    def rewinds(self) -> deque[Place]:
        """Where the session went on after ``rewind`` and ``branch``, the newest 64."""
        return self._protocol.rewinds

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

    def rewind(self, chunk: int, branch: int | None = None) -> Sent:
        """Go back to just before ``chunk``; what came after it in its branch is forgotten.

        ``ChunkStats.kept_from`` is the first chunk that is kept. ``branch`` None: the one that the session is on.
        Frames of the old line may still come first; ``rewinds`` has where the session went on.
        """
        return self._event("rewind", _place_payload(chunk, branch))

    def branch(self, chunk: int, branch: int | None = None) -> Sent:
        """Go back to just before ``chunk`` and begin a new branch there. What came after stays: ``rewind`` gets to it.

        Branches are numbered from 0, that of the session's beginning.
        """
        return self._event("branch", _place_payload(chunk, branch))

    def send_event(self, kind: str, payload: object = None) -> Sent:
        """Any other event of the wire."""
        return self._event(kind, payload)

    def _event(self, kind: str, payload: object) -> Sent:
        self._event_id += 1
        event = {"type": "event", "kind": kind, "event_id": self._event_id, "payload": payload}
        message = msgspec.msgpack.encode(event)
        self._protocol.events.add(self._event_id, kind, message)
        return self._send(message, self._event_id)


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


def _place(fields: dict[str, Any]) -> Place:
    chunk_index, branch = fields.get("chunk_index"), fields.get("branch")
    return Place(
        chunk_index if isinstance(chunk_index, int) else None,
        branch if isinstance(branch, int) else None,
        fields.get("exact") is not False,
    )


def _place_payload(chunk: int, branch: int | None) -> dict[str, int]:
    return {"chunk": chunk} if branch is None else {"chunk": chunk, "branch": branch}


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
