"""Both kinds of session on a real socket, against a server that follows a script."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from lingbot_rt.client import (
    ConnectFailed,
    EventRefused,
    InitRefused,
    KeyRefused,
    ServerBusy,
    SessionLost,
    connect,
)
from lingbot_rt.client.start_picture import start_picture

pack = msgspec.msgpack.encode
unpack = msgspec.msgpack.decode
INIT = {"prompt": "A street.", "first_frame": b"picture", "size": "2x1"}


def batch(chunk_index: int, frames: int, event_id: int | None = None) -> bytes:
    fields = {
        "type": "frame_batch",
        "chunk_index": chunk_index,
        "content_type": "application/x-raw-rgb",
        "num_frames": frames,
        "width": 2,
        "height": 1,
        "payload": bytes(6 * frames),
    }
    return pack(fields | ({} if event_id is None else {"event_id": event_id}))


def stats(chunk_index: int) -> bytes:
    return pack({"type": "chunk_stats", "chunk_index": chunk_index, "num_frames": 1, "chunk_total_ms": 5})


@contextmanager
def serving(script: Callable[[ServerConnection], None], **options: object) -> Iterator[str]:
    """Runs ``script`` for each client. Yields the URL."""
    with serve(script, "127.0.0.1", 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def two_chunks(connection: ServerConnection) -> None:
    """Sends one chunk, waits for an event, sends another chunk with its id, and ends normally."""
    assert unpack(connection.recv())["type"] == "init"
    for message in (batch(0, 1), batch(0, 2), stats(0)):
        connection.send(message)
    event = unpack(connection.recv())
    for message in (batch(1, 2, event["event_id"]), stats(1)):
        connection.send(message)
    connection.close(1000, "generation complete")


def test_blocking_session():
    """Frames arrive in order with chunk, index and event id. A normal close ends the loop."""
    seen = []
    with serving(two_chunks) as url, connect(url, **INIT) as world:
        for frame in world:
            seen.append((frame.index, frame.chunk_index, frame.event_id))
            if frame.index == 2:
                assert world.press("w") == 1
        assert [chunk.chunk_index for chunk in world.stats] == [0, 1]
    assert seen == [(0, 0, None), (1, 0, None), (2, 0, None), (3, 1, 1), (4, 1, 1)]


async def test_async_session():
    """The async session gets the same frames."""
    seen = []
    with serving(two_chunks) as url:
        async with connect(url, **INIT) as world:
            async for frame in world:
                seen.append((frame.index, frame.chunk_index, frame.event_id))
                if frame.index == 2:
                    assert await world.press("w") == 1
            assert [chunk.chunk_index for chunk in world.stats] == [0, 1]
    assert seen == [(0, 0, None), (1, 0, None), (2, 0, None), (3, 1, 1), (4, 1, 1)]


@pytest.mark.parametrize(
    ("content", "code", "kind"),
    [
        ("another realtime session is already active", 1008, ServerBusy),
        ("invalid generate request: size: no", 1008, InitRefused),
        ("the server is shutting down", 1001, SessionLost),
        ("a valid API key is needed", 1008, KeyRefused),
    ],
)
def test_refusals_and_losses(content, code, kind):
    """The caller gets the error that the server sends before it closes."""

    def script(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(pack({"type": "error", "content": content}))
        connection.close(code, "why")

    with serving(script) as url, connect(url, **INIT) as world, pytest.raises(kind, match=content):
        next(world)


async def test_a_refusal_before_the_init_is_read():
    """A server that refuses at once may close before the init is sent. The first iteration raises its error."""

    def script(connection: ServerConnection) -> None:
        connection.send(pack({"type": "error", "content": "no", "code": "unauthorized"}))
        connection.close(1008, "unauthorized")

    init = INIT | {"first_frame": bytes(8_000_000)}  # too large for the buffers of a socket
    with serving(script, max_size=None) as url:
        with connect(url, **init) as world, pytest.raises(KeyRefused) as caught:
            next(world)
        assert not caught.value.reconnectable
        async with connect(url, **init) as world:
            with pytest.raises(KeyRefused):
                await anext(world)


def test_a_refused_event_leaves_the_session_alive():
    """Iteration goes on after EventRefused."""

    def script(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(pack({"type": "error", "content": "invalid event: no"}))
        connection.send(batch(0, 1))
        connection.close()

    with serving(script) as url, connect(url, **INIT) as world:
        with pytest.raises(EventRefused):
            next(world)
        assert next(world).index == 0
        with pytest.raises(StopIteration):
            next(world)


def test_a_broken_connection_is_a_lost_session():
    """A connection that breaks without a close raises a reconnectable SessionLost without a close code."""

    def script(connection: ServerConnection) -> None:
        connection.recv()
        connection.socket.shutdown(socket.SHUT_RDWR)

    with serving(script) as url, connect(url, **INIT) as world:
        with pytest.raises(SessionLost) as caught:
            next(world)
        assert caught.value.close_code is None
        assert caught.value.reconnectable
        with pytest.raises(SessionLost):
            world.press("w")


def test_leaving_with_unread_frames():
    """Leaving does not read the waiting frames first, and the server receives the close."""
    closed = threading.Event()

    def script(connection: ServerConnection) -> None:
        connection.recv()
        with pytest.raises(ConnectionClosed):
            for _ in range(50):
                connection.send(batch(0, 1))
            connection.recv()
        closed.set()

    with serving(script) as url:
        with connect(url, **INIT) as world:
            next(world)
        assert closed.wait(30)


def test_nobody_there():
    """A port without a listener raises a reconnectable ConnectFailed."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectFailed) as caught, connect(url, **INIT):
            pass
    assert caught.value.reconnectable


async def test_refused_handshake():
    """An HTTP error instead of a WebSocket is reported with its status. The API key was sent."""
    keys = []

    def refuse(connection, request):
        keys.append(request.headers["Authorization"])
        return connection.respond(403, "no")

    with serving(two_chunks, process_request=refuse) as url:
        with pytest.raises(ConnectFailed, match="403") as caught:
            async with connect(url, api_key="secret", **INIT):
                pass
        with pytest.raises(ConnectFailed, match="403"), connect(url, api_key="secret", **INIT):
            pass
    assert set(keys) == {"Bearer secret"}
    assert not caught.value.reconnectable


def one_frame(inits: list[dict]) -> Callable[[ServerConnection], None]:
    """A script that keeps the init, sends one frame and ends."""

    def script(connection: ServerConnection) -> None:
        inits.append(unpack(connection.recv()))
        connection.send(batch(0, 1))
        connection.close()

    return script


def model_entry(body: str) -> Callable:
    """Answers /v1/models; everything else is left to the WebSocket."""

    def respond(connection, request):
        return connection.respond(200, body) if request.path == "/v1/models" else None

    return respond


async def test_what_connect_fills_in():
    """A session that names neither picture nor size has the package's picture and the served model's own size."""
    inits: list[dict] = []
    entry = model_entry('{"data": [{"default_size": "160x96"}]}')
    with serving(one_frame(inits), process_request=entry) as url:
        with connect(url, prompt="A street.") as world:
            assert len(list(world)) == 1
        async with connect(url, prompt="A street.") as world:
            assert len([frame async for frame in world]) == 1
        with connect(url, prompt="A street.", size="64x64", first_frame=b"mine") as world:
            list(world)
    assert [init["size"] for init in inits] == ["160x96", "160x96", "64x64"]
    assert [init["first_frame"] for init in inits] == [start_picture(), start_picture(), b"mine"]


@pytest.mark.parametrize("body", ["", "{}", '{"data": [{"default_size": 5}]}', '{"data": [{"default_size": "big"}]}'])
def test_a_server_that_tells_no_size(body):
    """The init has none either, so that the server's default holds."""
    inits: list[dict] = []
    with serving(one_frame(inits), process_request=model_entry(body)) as url, connect(url, prompt="A street.") as world:
        list(world)
    assert "size" not in inits[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": "A street.", "sise": "64x64"}, "'sise'.*nearest is size"),
        ({"promt": "A street."}, "'promt'.*nearest is prompt"),
        ({"prompt": "A street.", "firstframe": b""}, "'firstframe'.*nearest is first_frame"),
        ({"prompt": "A street.", "apikey": "secret"}, "'apikey'.*nearest is api_key"),
        ({"prompt": "A street.", "steps": 4}, "'steps'.*nearest is num_inference_steps"),
        ({"prompt": "A street.", "type": "event"}, "'type'"),
        ({}, "prompt: missing"),
    ],
)
def test_misspelt_arguments_are_refused(arguments, named):
    """At once and by name, without a value and before anything is sent."""
    with pytest.raises(InitRefused, match=named) as caught:
        connect("http://127.0.0.1:1", **arguments)
    assert "secret" not in str(caught.value)
    assert not caught.value.reconnectable
