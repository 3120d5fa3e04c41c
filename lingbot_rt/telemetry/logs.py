"""The log on stderr, without keys."""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import quote, quote_plus, unquote_plus

_PARAMETER = re.compile(r"([?&;])([^\s=&;?\"']+)=([^\s&;\"']*)")
_HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|(?:x-)?api[-_]key)(:\s*)[^\r\n]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s'\",;)]+")
_HIDDEN = "***"


class HideKeys(logging.Filter):
    """Replaces keys in log records by ``***``, in messages and tracebacks: the server's own key wherever it stands, and
    whatever a client sends as a key.

    Clients send keys in the query (``?api_key=KEY``) and in headers, which the WebSocket library logs at debug level.
    """

    def __init__(self, key: str | None = None) -> None:
        super().__init__()
        spellings = {key, quote(key, safe=""), quote_plus(key), repr(key)[1:-1]} if key else set()
        longest_first = sorted(map(re.escape, spellings), key=len, reverse=True)
        self._key = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)") if spellings else None

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        hidden = self.hide(message)
        if hidden != message:
            record.msg, record.args = hidden, None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self.hide(record.exc_text)
        return True

    def hide(self, text: str) -> str:
        """``text`` without keys."""
        text = _PARAMETER.sub(_hidden_parameter, text)
        text = _HEADER.sub(rf"\1\2{_HIDDEN}", text)
        text = _BEARER.sub(rf"\1{_HIDDEN}", text)
        return text if self._key is None else self._key.sub(_HIDDEN, text)


def _hidden_parameter(match: re.Match[str]) -> str:
    # Names may be percent-encoded too: the server reads api%5Fkey as api_key.
    is_key = unquote_plus(match[2]).strip().lower() == "api_key"
    return f"{match[1]}{match[2]}={_HIDDEN}" if is_key else match[0]


class LoggedSession:
    """The session of a connection, for lines that are logged in its tasks. ``enter`` before the tasks are made."""

    current: ClassVar[ContextVar[LoggedSession | None]] = ContextVar("logged_session", default=None)

    def __init__(self) -> None:
        self.session_id: str | None = None  # None before an init was taken

    def enter(self) -> None:
        self.current.set(self)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and where they are known session, figures and error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        logged = LoggedSession.current.get()
        if logged is not None and logged.session_id is not None:
            line["session"] = logged.session_id
        if figures := getattr(record, "figures", None):
            line["figures"] = figures
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["error"] = record.exc_text
        return json.dumps(line, default=str)


def configure_logging(level: str, *, key: str | None = None, log_format: str = "text") -> None:
    """Logs to stderr what has at least ``level``: debug, info, warning or error. Replaces an earlier configuration.

    ``key``: the server's API key, which is hidden wherever it would be logged. ``log_format``: text or json.
    """
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if log_format == "json" else plain)
    handler.addFilter(HideKeys(key))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
