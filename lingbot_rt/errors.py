"""Every error a user can meet, with its wire code and where it stops.

LingbotError
├── ConfigError            a flag, an environment variable or the config file is wrong: one line, exit code 2
├── CheckpointError        the model folder is missing, incomplete or does not fit its config: exit code 2
├── RecordError            a session record is missing, damaged or of another format
├── PlayFailed             a scripted session did not come to its end
├── RequestError           what a client sent is wrong; nothing changed and the session lives on
│   ├── InvalidInit        -> "invalid generate request: FIELD: ..."
│   └── InvalidEvent       -> "invalid event: ..."
├── NotReady               the model is still loading; the client may ask again on the same socket
├── Unauthorized           the API key is missing or wrong -> close 1008
├── SessionBusy            the live session's slot is taken -> close 1008
├── CapacityError          the session would not fit in memory; the message has the numbers
├── PauseExpired           a session stayed paused for longer than --pause-limit-s -> close 1008
├── MessageTooLarge        a client message is over --max-message-mb -> close 1009
├── ShuttingDown           the server ends -> close 1001
├── ChunkCancelled         a chunk was stopped because its session closed; never sent to a client
├── ClientTooSlow          a client neither read nor closed for --send-timeout-s
├── EngineFailed           the engine broke while it ran a chunk -> "error during generate loop: ...", close 1011
│   └── PeerLost           a collective broke because another rank went away
└── ClientError            raised by ``lingbot_rt.client`` only
    ├── ConnectFailed      nobody listens there, or the handshake was refused
    ├── ServerBusy         another session holds the server                    reconnectable
    ├── ServerNotReady     the server is still loading its model               reconnectable
    ├── InitRefused        the server refused the init: its words name the field
    ├── EventRefused       one event was refused; nothing changed and the session lives on
    ├── SessionLost        the server ended the session, or the line broke     reconnectable
    └── ProtocolError      what arrived is not the wire this client speaks
"""

from __future__ import annotations


class LingbotError(Exception):
    """Base of all named errors. ``str(error)`` is one line: what, where, what to do.

    ``code`` is stable for programs; ``field`` names the offending field of a message or flag, when there is one.
    """

    code = "error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    @property
    def wire_content(self) -> str:
        """The one-line ``content`` of the error message a client gets."""
        return str(self)


class ConfigError(LingbotError):
    code = "config"


class CheckpointError(LingbotError):
    code = "checkpoint"


class RequestError(LingbotError):
    """A client message that is refused whole."""


class InvalidInit(RequestError):
    code = "invalid_init"

    @property
    def wire_content(self) -> str:
        field = f"{self.field}: " if self.field else ""
        return f"invalid generate request: {field}{self}"


class InvalidEvent(RequestError):
    code = "invalid_event"

    @property
    def wire_content(self) -> str:
        field = f"{self.field}: " if self.field else ""
        return f"invalid event: {field}{self}"


class SessionBusy(LingbotError):
    code = "session_busy"

    def __init__(self) -> None:
        super().__init__("another realtime session is already active")


class CapacityError(LingbotError):
    code = "capacity"

    @property
    def wire_content(self) -> str:
        return f"invalid generate request: {self}"


class ChunkCancelled(LingbotError):
    code = "cancelled"


class ClientTooSlow(LingbotError):
    code = "client_too_slow"


class EngineFailed(LingbotError):
    code = "engine_failed"

    @property
    def wire_content(self) -> str:
        return f"error during generate loop: {self}"


class PeerLost(EngineFailed):
    """A collective broke because another rank went away. The watchdog knows which one."""


class RecordError(LingbotError):
    code = "record"


class PlayFailed(LingbotError):
    code = "play_failed"


class NotReady(LingbotError):
    code = "not_ready"


class Unauthorized(LingbotError):
    code = "unauthorized"

    def __init__(self) -> None:
        super().__init__("a valid API key is needed: Authorization: Bearer KEY, or ?api_key=KEY on the WebSocket")


class PauseExpired(LingbotError):
    code = "pause_expired"


class MessageTooLarge(LingbotError):
    code = "message_too_large"


class ShuttingDown(LingbotError):
    code = "shutting_down"


def one_line(error: BaseException) -> str:
    """``RuntimeError: the kernel said no``: the kind of an error and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


class ClientError(LingbotError):
    """Base of the client's errors. ``reconnectable``: the same call may well succeed a little later."""

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


class SessionLost(ClientError):
    """``close_code`` is the WebSocket's, None when the line broke without one."""

    code = "session_lost"
    reconnectable = True

    def __init__(self, message: str, *, close_code: int | None = None) -> None:
        super().__init__(message)
        self.close_code = close_code


class ProtocolError(ClientError):
    code = "protocol"
