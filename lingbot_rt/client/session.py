"""The client's half of the wire without any socket: verbs become messages, messages become frames and statistics.

The blocking and the async session are thin fronts over ``SessionCore`` (what arrives) and ``Front`` (what leaves).
"""

from __future__ import annotations

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
from PIL import Image

from lingbot_rt.client.frames import Frame, FrameDecoder, Pixels
from lingbot_rt.config import ENDPOINT
from lingbot_rt.errors import (
    ClientError,
    EventRefused,
    InitRefused,
    ProtocolError,
    ServerBusy,
    ServerNotReady,
    SessionLost,
)

CAMERA_ON: tuple[tuple[str, ...], ...] = ((),)
"""A script of one latent frame without keys: the session has camera control from its first chunk on."""

_KEPT_STATS = 1024
_NORMAL_CLOSE = 1000

Sent = TypeVar("Sent")


@dataclass(frozen=True, slots=True)
class ChunkStats:
    """A chunk's measurements in milliseconds; None where the server does not tell."""

    chunk_index: int
    num_frames: int
    event_id: int | None
    chunk_total_ms: float
    dit_ms: float | None
    vae_ms: float | None
    encode_ms: float | None
    window_frames: int | None
    message: dict[str, Any] = field(repr=False)  # chunk_stats as it came

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> ChunkStats:
        try:
            return cls(
                chunk_index=message["chunk_index"],
                num_frames=message["num_frames"],
                event_id=message.get("event_id"),
                chunk_total_ms=message["chunk_total_ms"],
                dit_ms=message.get("dit_ms"),
                vae_ms=message.get("vae_ms"),
                encode_ms=message.get("encode_ms"),
                window_frames=message.get("window_frames"),
                message=message,
            )
        except KeyError as error:
            raise ProtocolError(f"chunk_stats lacks {error}") from None

    @property
    def overhead_ms(self) -> float | None:
        """The part of the chunk that neither DiT nor VAE used."""
        if self.dit_ms is None or self.vae_ms is None:
            return None
        return self.chunk_total_ms - self.dit_ms - self.vae_ms


class SessionCore:
    """Everything that arrives, in order. Holds one batch of frames at most."""

    def __init__(self) -> None:
        self.stats: deque[ChunkStats] = deque(maxlen=_KEPT_STATS)
        self._decoder = FrameDecoder()
        self._header: dict[str, Any] | None = None
        self._last_words: str | None = None

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
            case "error":
                self._raise(str(fields.get("content", "")), fields.get("code"))
            case _:
                pass  # an extension this client did not ask for
        return []

    def closed(self, code: int | None, reason: str) -> None:
        """The line is closed: returns after a normal end, else raises SessionLost with the server's last words."""
        if code != _NORMAL_CLOSE:
            words = self._last_words or reason or "the line broke"
            raise SessionLost(f"session lost: {words}", close_code=code)

    def _raise(self, content: str, code: str | None) -> None:
        kinds: list[tuple[str, type[ClientError]]] = [
            ("another realtime session", ServerBusy),
            ("the server is not ready", ServerNotReady),
            ("invalid generate request", InitRefused),
            ("invalid event", EventRefused),
        ]
        for start, kind in kinds:
            if content.startswith(start) or code == kind.code:
                raise kind(content)
        # Any other error announces the close that follows it; that close ends the session with these words.
        self._last_words = content


class Front(ABC, Generic[Sent]):
    """What a blocking and an async session share: the verbs and the statistics.

    Each verb sends one message; its event id comes back in ``Frame.event_id``.

    ``Sent`` is ``int``, the event id, in a blocking session and an awaitable of it in an async one.
    Keys are w a s d to move and i j k l to look.
    """

    def __init__(self) -> None:
        self._core = SessionCore()
        self._ready: deque[Frame] = deque()  # of the batch that came last
        self._held: tuple[str, ...] = ()
        self._event_id = 0

    @property
    def stats(self) -> deque[ChunkStats]:
        """Of the last 1,024 chunks; a chunk's arrive after its frames."""
        return self._core.stats

    @abstractmethod
    def _send(self, message: bytes, event_id: int) -> Sent: ...

    def press(self, *keys: str) -> Sent:
        """Hold ``keys`` down, beside those that are held already."""
        return self.hold(*self._held, *keys)

    def release(self, *keys: str) -> Sent:
        """Let go of ``keys``; of all when none is named."""
        return self.hold(*(key for key in self._held if keys and key not in keys))

    def hold(self, *keys: str) -> Sent:
        """Hold exactly ``keys`` from now on."""
        self._held = tuple(dict.fromkeys(keys))
        transition = {"actions": list(self._held), "client_ts_ms": time.time() * 1000}
        return self._event("camera_actions", {"mode": "state", "transitions": [transition]})

    def script(self, actions: Sequence[Sequence[str]]) -> Sent:
        """Play ``actions``, one list of keys a latent frame (four pixel frames), in place of held keys."""
        self._held = ()
        return self._event("camera_actions", [list(keys) for keys in actions])

    def prompt(self, text: str) -> Sent:
        """Change the sentence; in force from the next chunk."""
        return self._event("prompt", text)

    def _event(self, kind: str, payload: object) -> Sent:
        self._event_id += 1
        event = {"type": "event", "kind": kind, "event_id": self._event_id, "payload": payload}
        return self._send(msgspec.msgpack.encode(event), self._event_id)


def init_message(
    prompt: str,
    first_frame: bytes | str | Path | Pixels,
    script: Sequence[Sequence[str]] | None = CAMERA_ON,
    **fields: object,
) -> bytes:
    """The first message of a session.

    ``first_frame``: an encoded picture, the path of one, a ``data:`` or http(s) URL that the server resolves, or
    pixels uint8 [H, W, 3]. ``script``: keys of the first latent frames; None leaves camera control off until a key
    comes. ``fields``: the wire's own, such as ``size="832x480"``, ``seed=1``, ``realtime_output_format="jpeg"``.
    """
    message: dict[str, object] = {"type": "init", "prompt": prompt, "first_frame": _picture(first_frame)}
    if script is not None:
        message["condition_inputs"] = {"camera_actions": [list(keys) for keys in script]}
    message |= {name: value for name, value in fields.items() if value is not None}
    return msgspec.msgpack.encode(message)


def websocket_url(url: str) -> str:
    """``http://host:port`` or ``ws://host:port`` -> the session endpoint there; a URL with a path stays as it is."""
    if "://" not in url:
        url = "ws://" + url
    scheme, rest = url.split("://", 1)
    scheme = {"http": "ws", "https": "wss"}.get(scheme, scheme)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host}{slash}{path}" if path else f"{scheme}://{host}{ENDPOINT}"


def _unpack(message: bytes) -> dict[str, Any]:
    try:
        return msgspec.msgpack.decode(message, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a message is not a MessagePack map: {error}") from None


def _picture(first_frame: bytes | str | Path | Pixels) -> bytes | str:
    if isinstance(first_frame, np.ndarray):
        png = io.BytesIO()
        Image.fromarray(first_frame).save(png, "PNG")
        return png.getvalue()
    if isinstance(first_frame, bytes):
        return first_frame
    if isinstance(first_frame, str) and first_frame.startswith(("data:", "http://", "https://")):
        return first_frame
    return Path(first_frame).read_bytes()
