"""Every error a user can meet, with its wire code and where it stops.

LingbotError
├── ConfigError            a flag, an environment variable or the config file is wrong: one line, exit code 2
├── CheckpointError        the model folder is missing, incomplete or does not fit its config: exit code 2
├── RequestError           what a client sent is wrong; nothing changed and the session lives on
│   ├── InvalidInit        -> "invalid generate request: FIELD: ..."
│   └── InvalidEvent       -> "invalid event: ..."
├── SessionBusy            the live session's slot is taken -> close 1008
├── CapacityError          the session would not fit in memory; the message has the numbers
├── ChunkCancelled         a chunk was stopped because its session closed; never sent to a client
├── ClientTooSlow          a client neither read nor closed for --send-timeout-s
└── EngineFailed           the engine broke while it ran a chunk -> "error during generate loop: ...", close 1011
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
