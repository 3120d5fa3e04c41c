"""Every named error: its wire code and what follows from it.

LingbotError
├── ConfigError            a flag, an environment variable or the config file is wrong: one line, exit code 2
├── CheckpointError        the model folder is missing, incomplete or does not match its config: exit code 2
├── RecordError            a session record is missing, damaged or in another format
├── PlayFailed             a scripted session did not reach its end
├── OutputFailed           a file of frames or figures, or standard output, cannot be written
│   └── ReaderGone         the program that read standard output has ended: exit code 141, without a message
├── RequestError           a client message is wrong: nothing changes, and the session goes on
│   ├── InvalidInit        -> "invalid generate request: FIELD: ..."
│   │   └── InvalidFirstFrame  the picture of an init cannot be read or fetched, or is too large
│   └── InvalidEvent       -> "invalid event: FIELD: ..."
├── NotReady               the model is still loading: the client may ask again on the same socket
├── Unauthorized           the API key is missing or wrong -> close 1008
├── SessionBusy            another session is running -> close 1008
├── CapacityError          the session does not fit in memory: the message gives the numbers
├── PauseExpired           the session stayed paused for longer than --pause-limit-s -> close 1008
├── ResumedElsewhere       another connection came with the session's token -> close 1008
├── MessageTooLarge        a client message is larger than --max-message-mb -> close 1009
├── ShuttingDown           the server stops -> close 1001
├── ChunkCancelled         the session of a running chunk was closed: never sent to a client
├── ClientTooSlow          the client did not read for --send-timeout-s
├── EngineFailed           the engine failed while it ran a chunk -> "error during generate loop: ...", close 1011
│   ├── PeerLost           a collective failed because another rank is gone
│   └── UnsoundFrames      the networks gave NaN, infinite or constant values: the session ends, the engine lives
└── ClientError            raised only by ``lingbot_rt.client``
    ├── ConnectFailed      no server listens there, or it refused the handshake
    ├── ServerBusy         another session is running                          reconnectable
    ├── ServerNotReady     the server is still loading its model               reconnectable
    ├── KeyRefused         the API key is missing or wrong
    ├── MessageRefused     a message, such as the init, is larger than the server's limit
    ├── InitRefused        the server, or connect itself, refused the init: the message names the field
    ├── EventRefused       the server refused one event: nothing changes, and the session goes on
    ├── SaveFailed         the server did not answer with the world                reconnectable
    ├── SessionLost        the server ended the session, or the connection broke   reconnectable
    └── ProtocolError      the server sent something that this client cannot read
"""

from __future__ import annotations

import re


class LingbotError(Exception):
    """Base of all named errors. ``str(error)`` is one line: what is wrong, where, and what to do.

    ``code`` is a stable name for programs. ``field`` names the wrong field of a message or the wrong flag, if any.
    """

    code = "error"
    event_id: int | None = None  # of the refused event, where it is told

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    @property
    def described(self) -> str:
        """The line that a command prints: what failed as a whole, then ``str(error)``."""
        return str(self)

    @property
    def wire_content(self) -> str:
        """The ``content`` of the error message that a client gets. It names no path of the server."""
        return self.described


class ConfigError(LingbotError):
    code = "config"

    @property
    def wire_content(self) -> str:
        return public_text(self.described)


class CheckpointError(LingbotError):
    code = "checkpoint"

    @property
    def wire_content(self) -> str:
        return public_text(self.described)


class RequestError(LingbotError):
    """A client message that is refused as a whole."""

    subject = "invalid message"

    @property
    def described(self) -> str:
        return f"{self.subject}: {self.field}: {self}" if self.field else f"{self.subject}: {self}"


class InvalidInit(RequestError):
    code = "invalid_init"
    subject = "invalid generate request"


class InvalidFirstFrame(InvalidInit):
    def __init__(self, message: str) -> None:
        super().__init__(message, field="first_frame")


class InvalidEvent(RequestError):
    code = "invalid_event"
    subject = "invalid event"


class SessionBusy(LingbotError):
    code = "session_busy"

    def __init__(self, max_waiting: int | None = None) -> None:
        """``max_waiting``: the length of the line, for a client that would have waited but found it full."""
        line = "" if max_waiting is None else f", and the line is full (--max-waiting {max_waiting})"
        super().__init__(f"another realtime session is already active{line}")


class CapacityError(LingbotError):
    code = "capacity"

    @property
    def described(self) -> str:
        return f"invalid generate request: {self}"


class ChunkCancelled(LingbotError):
    code = "cancelled"


class ClientTooSlow(LingbotError):
    code = "client_too_slow"


class EngineFailed(LingbotError):
    code = "engine_failed"

    @property
    def described(self) -> str:
        return f"error during generate loop: {self}"

    @property
    def wire_content(self) -> str:
        return public_text(self.described)


class PeerLost(EngineFailed):
    """A collective failed because another rank is gone. The watchdog knows which one."""


class UnsoundFrames(EngineFailed):
    """Latents or pixels of a chunk are NaN, infinite or constant. They are not sent."""


class RecordError(LingbotError):
    code = "record"


class PlayFailed(LingbotError):
    code = "play_failed"


class NotReady(LingbotError):
    code = "not_ready"

    @property
    def wire_content(self) -> str:
        return public_text(self.described)


class Unauthorized(LingbotError):
    code = "unauthorized"

    def __init__(self) -> None:
        super().__init__("a valid API key is needed: Authorization: Bearer KEY, or ?api_key=KEY on the WebSocket")


class PauseExpired(LingbotError):
    code = "pause_expired"


class ResumedElsewhere(LingbotError):
    code = "resumed_elsewhere"

    def __init__(self) -> None:
        super().__init__("the session goes on over another connection, which came with its token")


class MessageTooLarge(LingbotError):
    code = "message_too_large"


class ShuttingDown(LingbotError):
    code = "shutting_down"


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message: ``OSError: [Errno 28] No space left on device``."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


class ClientError(LingbotError):
    """Base of the client's errors. ``reconnectable``: the same call may succeed a little later."""

    code = "client"
    reconnectable = False


class ConnectFailed(ClientError):
    code = "connect_failed"

    def __init__(self, message: str, *, reconnectable: bool) -> None:
        super().__init__(message)
        self.reconnectable = reconnectable


class ServerBusy(ClientError):
    code = "session_busy"
    reconnectable = True


class ServerNotReady(ClientError):
    code = "not_ready"
    reconnectable = True


class InitRefused(ClientError):
    code = "invalid_init"


class EventRefused(ClientError):
    code = "invalid_event"


class SaveFailed(ClientError):
    code = "save_failed"
    reconnectable = True


class SessionLost(ClientError):
    """``close_code`` is the WebSocket's close code; None: the connection broke without one."""

    code = "session_lost"
    reconnectable = True

    def __init__(self, message: str, *, close_code: int | None = None) -> None:
        super().__init__(message)
        self.close_code = close_code


class ProtocolError(ClientError):
    code = "protocol"


class KeyRefused(ClientError):
    code = "unauthorized"


class MessageRefused(ClientError):
    code = "message_too_large"


class OutputFailed(LingbotError):
    code = "output"


class ReaderGone(OutputFailed):
    code = "reader_gone"


MAX_QUOTED = 100
"""Characters of a value that a message shows."""


def quoted(text: str) -> str:
    """``text`` in quotes for a message: control characters are escaped, and a long text is cut."""
    return repr(text) if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]!r}..."


def printable(text: str) -> str:
    r"""``text`` without the characters that a terminal acts on: a line end becomes ``\n``, an escape ``\x1b``."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def reason_of(error: OSError) -> str:
    """The system's reason without number and path: ``No space left on device``."""
    return error.strerror or str(error) or type(error).__name__


_ADDRESS = re.compile(r"\s*\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{6,}")
_QUOTED_PATH = re.compile(r"(['\"`])/(?:[^'\"`]*/)*([^'\"`/]*)/*\1")
_PATH = re.compile(r"(?<![\w:/.~-])/(?:[^\s'\"`,;:()<>/]+/)*([^\s'\"`,;:()<>/]+)/?")


def public_text(text: str) -> str:
    """``text`` for a client: without the addresses of objects, and of absolute paths only the last name."""
    text = _ADDRESS.sub("", text)
    text = _QUOTED_PATH.sub(r"\1\2\1", text)
    return _PATH.sub(r"\1", text)
