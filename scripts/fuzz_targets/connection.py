"""Several clients of one server at once, over sockets in memory that break at any moment."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec
from fastapi import WebSocketDisconnect

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import EngineFailed
from lingbot_rt.server.app import create_app
from lingbot_rt.server.connection import Connection
from lingbot_rt.server.service import Service
from lingbot_rt.server.websocket import NOT_UTF8, TOO_LARGE
from scripts.fuzz_targets import messages
from scripts.fuzz_targets.bounds import noted
from tests.server.fake_engine import FakeEngine

LIMIT_S = 120.0

CODES = {
    *("invalid_init", "invalid_event", "not_ready", "capacity", "session_busy", "pause_expired"),
    *("message_too_large", "engine_failed", "shutting_down", "resumed_elsewhere"),
}
CLOSES = {1000, 1001, 1007, 1008, 1009, 1011}
PICTURE = b"P6 64 64 255\n" + bytes(64 * 64 * 3)


def try_case(random: Random) -> str:
    kept = _Kept()
    logging.getLogger().addHandler(kept)
    logs = [logging.getLogger(name) for name in ("lingbot_rt", "asyncio")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        return asyncio.run(_serve(random, kept))
    finally:
        logging.getLogger().removeHandler(kept)
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


class _Kept(logging.Handler):
    """What is logged with a traceback: an error that nobody named."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.errors.append(logging.Formatter().format(record))


async def _serve(random: Random, kept: _Kept) -> str:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: kept.errors.append(str(context)))
    engine = FakeEngine(
        fail_at_chunk=random.choice((None, None, None, 0, 1)), max_open_pixels=random.choice((10**9, 10**9, 64 * 64))
    )
    config = ServeConfig(
        session_wait_s=random.choice((0.0, 0.001, 60.0)),
        init_timeout_s=random.choice((0.1, 60.0)),
        max_message_mb=1,
        resume_s=random.choice((0.0, 60.0, 60.0)),
        parked_mb=random.choice((0, 1, 4096)),
        history_mb=random.choice((0, 512)),
    )
    service: Service = create_app(config, engine).state.service
    await engine.start()
    tokens: list[str] = []
    sockets = [_Socket(random, tokens) for _ in range(random.choice((1, 1, 2, 3)))]
    with noted([socket.story for socket in sockets]):
        try:
            connections = [Connection(socket, service) for socket in sockets]  # type: ignore[arg-type]
            tasks = [asyncio.create_task(connection.run()) for connection in connections]
            ending = asyncio.create_task(_stop_when_told(service, sockets, random))
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*tasks)
                ending.cancel()
                await asyncio.wait({ending})
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            async with asyncio.timeout(LIMIT_S):
                if left:
                    await asyncio.wait(left)
            assert not service.connections
            assert not service.admission.is_busy
            assert not service.admission.waiting
            await service.parking.settled()
            assert engine.live == sum(each.is_open for each in service.parking._kept.values()), "a session stays open"
            for each in list(service.parking._kept.values()):
                assert each.is_parked, "nobody holds it, and it is not parked"
                await service.parking.end(each, "not_resumed")
            assert not engine.live, "a session stays open"
            assert not kept.errors, kept.errors[0]
            return ", ".join(sorted({socket.check() for socket in sockets}))
        finally:
            await engine.stop()
            for pool in (service.encoders, service.readers):
                pool.shutdown(wait=True, cancel_futures=True)


async def _stop_when_told(service: Service, sockets: list[_Socket], random: Random) -> None:
    """The server shuts down, or loses its engine, once a client got that far that it only listens."""
    is_lost = random.random() < 0.3
    await asyncio.wait([asyncio.ensure_future(socket.listens.wait()) for socket in sockets])
    if is_lost:
        service.failure = EngineFailed("the engine hangs")
    for connection in list(service.connections):
        connection.stop()


def _going_back(random: Random) -> dict[str, Any]:
    kind = random.choice(("rewind", "branch", "save"))
    payload = {"chunk": random.choice((0, 0, 1, 2, 9)), "branch": random.choice((None, None, 0, 1))}
    event = {"type": "event", "kind": kind, "payload": payload, "event_id": 3}
    return {"type": "websocket.receive", "bytes": msgspec.msgpack.encode(event)}


@dataclass(eq=False)
class _Socket:
    """What a connection sees of a client that sends ``story`` and then leaves, or listens to the end."""

    random: Random
    tokens: list[str]  # of all sockets
    story: list[Any] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    closed: tuple[int, str] | None = None
    is_gone: bool = False

    def __post_init__(self) -> None:
        random = self.random
        self.listens = asyncio.Event()
        self._at = 0
        for _ in range(random.choice((0, 1, 1, 1, 2))):
            self.story.append(_message(random))
        if random.random() < 0.9:
            init = messages.init_map(random) | {
                "first_frame": PICTURE,
                "max_chunks": random.choice((None, 1, 3)),
                "realtime_output_format": random.choice(("raw", "webp", "delta-gzip")),
                "protocol_extensions": ["control_ack", "pause", "queue", "session", "heartbeat", "history"],
            }
            start = {"type": "websocket.receive", "bytes": msgspec.msgpack.encode(init)}
            self.story += random.choice(([start], [start], ["resumes", start], [random.randrange(4), "resumes"]))
        for _ in range(random.choice((0, 2, 10))):
            self.story.append(random.choice((_message(random), random.randrange(4), _going_back(random))))
        self.story.append(random.choice(("leaves", "listens", "breaks")))
        self._breaks_at = random.choice((None, None, None, 0, 1, 5))
        self.random = Random(random.random())  # its draws from here on depend on when it gets its turns

    async def receive(self) -> dict[str, Any]:
        while True:
            step = self.story[self._at]
            match step:
                case int():
                    for _ in range(10**step):
                        await asyncio.sleep(0)
                case "leaves" | "breaks":
                    self.is_gone = True
                    self.listens.set()
                    return {"type": "websocket.disconnect", "code": 1005 if step == "leaves" else 1006}
                case "resumes" if self.tokens:
                    self._at += 1
                    resume = {"type": "init", "resume": self.random.choice(self.tokens), "received_chunk": 0}
                    return {"type": "websocket.receive", "bytes": msgspec.msgpack.encode(resume)}
                case "resumes":
                    pass
                case "listens":
                    self.listens.set()
                    await asyncio.get_running_loop().create_future()
                case _:
                    await asyncio.sleep(0)
                    self._at += 1
                    return dict(step)
            self._at += 1

    async def send(self, message: dict[str, Any]) -> None:
        assert self.closed is None, "sent after the close"
        if self._breaks_at is not None and len(self.sent) >= self._breaks_at:
            self.is_gone = True
            self.listens.set()
            raise self.random.choice((RuntimeError("Unexpected ASGI message"), WebSocketDisconnect(1006)))
        for _ in range(self.random.choice((0, 0, 1, 3))):
            await asyncio.sleep(0)
        self.sent.append(message["bytes"])
        if b"resume_token" in message["bytes"][:500]:
            self.tokens.append(msgspec.msgpack.decode(message["bytes"])["resume_token"])

    async def close(self, code: int, reason: str) -> None:
        assert self.closed is None, "closed twice"
        self.closed = (code, reason)
        self.listens.set()

    def check(self) -> str:
        """What the client heard is the wire's, and the last of it explains the close; the close."""
        heard = []
        bodies = iter(self.sent)
        for data in bodies:
            message = msgspec.msgpack.decode(data)
            heard.append(message)
            if message["type"] == "frame_batch_header":
                assert len(next(bodies, data)) == message["total_size"] or self.is_gone
            assert message["type"] != "error" or message["code"] in CODES
        if self.closed is None:
            assert self.is_gone, "neither closed nor gone"
            return "gone"
        code, reason = self.closed
        assert code in CLOSES
        assert len(reason.encode()) <= 123
        if code == 1000:
            assert heard[-1]["type"] in ("chunk_stats", "control_ack", "heartbeat", "error")
        else:
            assert heard, "no error before the close"
            assert heard[-1]["type"] == "error", heard[-1]
        return str(code)


def _message(random: Random) -> dict[str, Any]:
    """One ASGI message of a client."""
    match random.randrange(12):
        case 0:
            return {"type": "websocket.receive", "text": "hello"}
        case 1 if random.random() < 0.3:
            return {"type": "websocket.receive", NOT_UTF8: True}
        case 2 if random.random() < 0.3:
            return {"type": "websocket.receive", TOO_LARGE: True}
        case 3 | 4 | 5:
            return {"type": "websocket.receive", "bytes": messages.message_bytes(random)}
    return {"type": "websocket.receive", "bytes": messages.pack(random, messages.event_map(random))}
