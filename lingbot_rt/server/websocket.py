"""The WebSocket transport: uvicorn's, with a bound on what is unsent and limits that a slow but living link passes.

uvicorn's own ``send`` returns when a message is in the transport's buffer, and megabytes more may stand in the kernel.
Frames that count as sent would then be seconds away from the client, and pings would wait behind them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Generator, Mapping
from typing import Any, ClassVar, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import PayloadTooBig
from websockets.frames import CloseCode, Frame
from websockets.protocol import State
from websockets.server import ServerProtocol

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ClientTooSlow
from lingbot_rt.server.frame_pieces import FramePieces

UNSENT_BYTES = 16 * 2**10
"""Most bytes that wait in the kernel, and again in the transport, once a message counts as sent."""

READ_BYTES = 2**10
"""Most bytes of headers and small frames that are parsed before the other connections have their turn."""

READ_PAYLOAD_BYTES = 64 * 2**10
"""Most bytes that are parsed at once of one frame's payload."""

TOO_LARGE = "too_large"
"""Key of the ASGI event that stands in for a message over the limit."""

NOT_UTF8 = "not_utf8"
"""Key of the ASGI event that stands in for a text message that is none."""

TOO_LARGE_CLOSE_S = 2.0
"""How long a client has after the close to stop sending such a message: its own close stands behind it, unread."""


def websocket_protocol(config: ServeConfig) -> type[WebSocketProtocol]:
    """The protocol class that uvicorn makes one of for each connection."""

    class Configured(WebSocketProtocol):
        send_timeout_s = config.send_timeout_s

    return Configured


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """``send`` returns when the bytes are on their way, and raises ClientTooSlow when the client takes none of them.

    A ``websocket.send`` with ``more`` set is followed by another one at once; it returns without waiting.
    """

    send_timeout_s: ClassVar[float] = 20.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Protocol(max_size=self.config.ws_max_size, logger=logging.getLogger("uvicorn.error"))
        self._is_too_large_told = False
        self._unread = bytearray()  # what came and is not parsed yet; the transport is paused meanwhile
        self._reading: asyncio.Handle | None = None
        self._pieces = FramePieces(self.config.ws_max_size)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.transport.set_write_buffer_limits(high=UNSENT_BYTES)
        connection = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        else:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * UNSENT_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.handshake_complete and self.conn.close_rcvd is None:
            # uvicorn's own event for a line that broke has the code of a close without one.
            self.queue.put_nowait(cast(Any, {"type": "websocket.disconnect", "code": CloseCode.ABNORMAL_CLOSURE}))
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:
            super().data_received(data)
            return
        self._unread += data
        if self._reading is None:
            self._read_on()

    def _read_on(self) -> None:
        """Parses a little. The rest waits for the other connections, and for the application to take what there is."""
        self._reading = None
        if not self.read_paused:
            part = self._unread[: max(READ_BYTES, min(self._pieces.left, READ_PAYLOAD_BYTES))]
            del self._unread[: len(part)]
            super().data_received(self._pieces.cut(bytes(part)))
        if self.transport.is_closing():
            self._unread.clear()
        elif self._unread:
            self.transport.pause_reading()
            if not self.read_paused:
                self._reading = self.loop.call_soon(self._read_on)
        elif not self.read_paused:
            self.transport.resume_reading()

    async def receive(self) -> Any:
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            if self._reading is None:
                self._reading = self.loop.call_soon(self._read_on)
        return message

    def handle_cont(self, event: Frame) -> None:
        """Joins as it goes: a message of a million fragments takes no more memory than its bytes."""
        joined = self.frames[0] if isinstance(self.frames[0], bytearray) else bytearray(self.frames[0])
        joined += event.data
        self.frames = [cast(Any, joined)]
        if event.fin:
            self.send_receive_event_to_app()

    def handle_ping(self) -> None:
        if self.transport.get_write_buffer_size() > 4 * UNSENT_BYTES:
            self.conn.data_to_send()  # pings from a client that does not read: their answers would gather
            return
        super().handle_ping()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent:
            # Text is not read, whatever it says, so a long one is not even decoded.
            is_short = sum(map(len, self.frames)) <= READ_PAYLOAD_BYTES
            text, self.frames = b"".join(self.frames) if is_short else b"", [b""]
            try:
                text.decode()
            except UnicodeDecodeError:
                # The application answers and closes.
                self.queue.put_nowait(cast(Any, {"type": "websocket.receive", NOT_UTF8: True}))
                return
        super().send_receive_event_to_app()

    async def send(self, message: Mapping[str, Any]) -> None:
        await self._until_written()
        await super().send(cast(Any, message))
        if not message.get("more"):
            await self._until_written()

    async def _until_written(self) -> None:
        """Waits until the transport's buffer is nearly empty, for as long as the client goes on taking bytes."""
        left = self.transport.get_write_buffer_size()
        while not self.writable.is_set():
            try:
                async with asyncio.timeout(self.send_timeout_s):
                    await self.writable.wait()
            except TimeoutError:
                now_left = self.transport.get_write_buffer_size()
                if now_left >= left:
                    raise ClientTooSlow(
                        f"the client read nothing for {self.send_timeout_s:g} s (--send-timeout-s)"
                    ) from None
                left = now_left

    def keepalive_timeout(self) -> None:
        if self.transport.get_write_buffer_size() and self.ping_timeout is not None:
            # The ping stands behind frames that the link has not carried yet. ``send`` watches over those.
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent and self.conn.state is not State.OPEN:
            # The client closed first, and its answer is still on the way: uvicorn's second close would raise, and
            # nothing that comes after it in the server's shutdown would be done.
            self.stop_keepalive()
            self.transport.close()
            return
        super().shutdown()

    def handle_parser_exception(self) -> None:
        if not isinstance(self.conn.parser_exc, PayloadTooBig):
            super().handle_parser_exception()
        elif not self._is_too_large_told:
            # The application answers and closes. What else the client sends is thrown away meanwhile.
            self._is_too_large_told = True
            self.close_timeout = TOO_LARGE_CLOSE_S
            self.queue.put_nowait(cast(Any, {"type": "websocket.receive", TOO_LARGE: True}))


class _Protocol(ServerProtocol):
    """Stays open for sending after a message over the limit, so that the client can be told."""

    def fail(self, code: int, reason: str = "") -> None:
        if code != CloseCode.MESSAGE_TOO_BIG or self.state is not State.OPEN:
            super().fail(code, reason)
            return
        self.parser = self._discard_all()
        next(self.parser)

    def _discard_all(self) -> Generator[None]:
        while not (yield from self.reader.at_eof()):
            self.reader.discard()
        yield
