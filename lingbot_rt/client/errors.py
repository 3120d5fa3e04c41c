"""What can go wrong at the client's end of the wire.

ClientError
├── ConnectFailed          nobody listens there, or the handshake was refused
├── ServerBusy             another session holds the server                    reconnectable
├── ServerNotReady         the server is still loading its model                reconnectable
├── InitRefused            the server refused the init: its words name the field
├── EventRefused           one event was refused; nothing changed and the session lives on
├── SessionLost            the server ended the session, or the line broke     reconnectable
└── ProtocolError          what arrived is not the wire this client speaks
"""

from __future__ import annotations

from lingbot_rt.errors import LingbotError


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
