"""Who may connect, and how large a message may be."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from websockets.exceptions import InvalidStatus

from tests.server.conftest import init, png
from tests.server.fake_engine import FakeEngine

SLOW = 0.02
"""Seconds per latent frame: slow enough to meet a chunk in the middle."""


async def test_the_api_key_on_the_websocket(serve):
    """By header or by query, as browsers can; without it an error in words and close 1008."""
    server = await serve(api_key="secret")
    for options in ({"path": "?api_key=secret"}, {"additional_headers": {"Authorization": "Bearer secret"}}):
        async with server.client(init(max_chunks=1), **options) as client:
            assert len((await client.chunk()).frames) == 9
    for path in ("", "?api_key=wrong", "?api_key=", "?api_key=%C3%A9"):
        async with server.client(path=path) as client:
            assert (await client.error())["code"] == "unauthorized"
            assert (await client.closed())[0] == 1008


async def test_narrowed_origins_hold_for_the_websocket_too(serve):
    """A listed origin, the server's own page and programs come in; any other page does not."""
    server = await serve(cors_allow_origins="https://good.example")
    own = f"http://127.0.0.1:{server.port}"
    for origin in ("https://good.example", own, None):
        async with server.client({"type": "init"}, origin=origin) as client:
            await client.error()
    with pytest.raises(InvalidStatus) as refused:
        async with server.client(origin="https://evil.example"):
            pass
    assert refused.value.response.status_code == 403


@pytest.fixture
def soon_over(monkeypatch) -> None:
    """A client with a message that is too large has less time after the close."""
    monkeypatch.setattr("lingbot_rt.server.websocket.TOO_LARGE_CLOSE_S", 0.5)


@pytest.mark.usefixtures("soon_over")
async def test_messages_above_the_limit_close_the_socket(serve):
    """--max-message-mb bounds what a client can make the server hold."""
    server = await serve(max_message_mb=1)
    too_large = msgspec.msgpack.encode(init(first_frame=png() + bytes(2**20)))
    async with server.client() as client:
        await client.socket.send(too_large)
        error = await client.error()
        assert error["code"] == "message_too_large"
        assert error["content"] == "the message is larger than 1 MiB (--max-message-mb)"
        assert (await client.closed())[0] == 1009
    await server.idle()


@pytest.mark.usefixtures("soon_over")
@pytest.mark.parametrize("size", [200, 30_000, 500_000])
async def test_fragments_above_the_limit_together_close_the_socket(serve, size):
    """The limit is that of the whole message, and a client that still sends is told, too."""
    server = await serve(max_message_mb=1)
    async with server.client() as client:
        fragments = [bytes(size)] * (2 * 2**20 // size)
        sending = asyncio.create_task(client.socket.send(fragments))
        assert (await client.error())["code"] == "message_too_large"
        assert (await client.closed())[0] == 1009
        await asyncio.wait({sending})
        sending.exception()
    await server.idle()
    async with server.client(init(max_chunks=1)) as client:
        assert len((await client.chunk()).frames) == 9


@pytest.mark.usefixtures("soon_over")
async def test_a_message_above_the_limit_ends_a_running_session_in_words(serve):
    """The error stands between two batches, also of those whose payload is a message of its own; the slot is free."""
    server = await serve(FakeEngine(group_s=SLOW), max_message_mb=1)
    async with server.client(init(size="256x160")) as client:
        await client.chunk()
        await client.socket.send(bytes(2**20 + 1))
        assert (await client.until("error"))["code"] == "message_too_large"
        assert (await client.closed())[0] == 1009
    await server.idle()
    async with server.client(init(max_chunks=1)) as client:
        assert len((await client.chunk()).frames) == 9
