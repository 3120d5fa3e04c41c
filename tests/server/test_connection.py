"""A connection from accept to close, in every state it can be in, over real sockets."""

from __future__ import annotations

import asyncio
import socket as sockets

import msgspec
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from lingbot_rt.config import ENDPOINT
from lingbot_rt.session.plan import EngineStatus
from tests.server.conftest import Client, event, init, png, running, state
from tests.server.fake_engine import FakeEngine

SLOW = 0.02
"""Seconds a latent frame: slow enough to meet a chunk in the middle."""


# --- before the session ---


async def test_a_bad_init_keeps_the_socket_for_another_try(serve):
    """Errors about an init name the field, and a good one sent afterwards on the same socket runs."""
    server = await serve()
    async with server.client(init(size="833x480")) as client:
        first = await client.error()
        assert first["content"] == (
            "invalid generate request: size: 833x480 is not a multiple of 16, nearest valid 832x480"
        )
        assert (first["code"], first["field"]) == ("invalid_init", "size")
        await client.send(init(first_frame=b"no picture"))
        assert (await client.error())["field"] == "first_frame"
        await client.send(init(max_chunks=1))
        assert len((await client.chunk()).frames) == 9
        assert (await client.closed())[0] == 1000


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"model": "other"}, "model", "expected 'fake-world'"),
        ({"prompt": "  "}, "prompt", "only white space"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "32x32"}, "size", "nearest valid 64x64"),
        ({"size": "4096x4096"}, "size", "nearest valid 960x960"),
        ({"realtime_causal_kv_cache_num_frames": 5}, "realtime_causal_kv_cache_num_frames", "at least 6"),
        (
            {"enable_upscaling": True, "upscaling_model_path": "https://example.org/x.pth"},
            "upscaling_model_path",
            "not a URL",
        ),
        (
            {"enable_frame_interpolation": True, "frame_interpolation_model_path": "x.pkl"},
            "frame_interpolation_model_path",
            "--postprocess-model-dir",
        ),
        ({"condition_inputs": {"camera_actions": [["x"]]}}, "condition_inputs.camera_actions[0]", "w, a, s, d"),
        ({"first_frame": "/etc/hostname"}, "first_frame", "--first-frame-dir"),
        ({"first_frame": "https://example.org/a.png"}, "first_frame", "--allow-remote-first-frame"),
        ({"first_frame": b""}, "first_frame", "expected a picture"),
    ],
)
async def test_what_an_init_may_not_ask_for(serve, fields, field, words):
    """Each refusal names its field and says what would be right."""
    server = await serve()
    async with server.client(init(**fields)) as client:
        error = await client.error()
    assert error["field"] == field
    assert words in error["content"]


async def test_without_an_init_in_time_the_socket_closes(serve):
    """The limit covers all tries together; the error comes before the close."""
    server = await serve(init_timeout_s=0.2)
    async with server.client({"type": "init"}) as client:
        assert (await client.error())["field"] == "prompt"
        assert "--init-timeout-s" in (await client.error())["content"]
        assert (await client.closed())[0] == 1008
    await server.idle()


async def test_text_frames_get_an_error_and_are_ignored(serve):
    """Text is answered in words, before a session as in it, and the session goes on."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client() as client:
        await client.socket.send('{"type": "init"}')
        assert "binary MessagePack" in (await client.error())["content"]
        await client.send(init())
        await client.receive()
        await client.socket.send("hello")
        error = await client.until("error")
        assert error["content"].startswith("invalid event: ")
        assert (await client.chunk()).stats["num_frames"] > 0


async def test_an_init_while_loading_names_the_stage(serve):
    """The stage and its progress are in the error, and the same socket is served once the model is there."""
    server = await serve(FakeEngine(loading=EngineStatus("loading weights", 0.63)))
    async with server.client(init(max_chunks=1)) as client:
        error = await client.error()
        assert "loading weights 63 %" in error["content"]
        assert error["code"] == "not_ready"
        server.engine.finish_loading()
        await client.send(init(max_chunks=1))
        assert len((await client.chunk()).frames) == 9


async def test_a_session_that_does_not_fit_is_refused_and_may_be_changed(serve):
    """The numbers of the CapacityError reach the client, and the slot is free for a smaller try."""
    server = await serve(FakeEngine(max_open_pixels=64 * 64))
    async with server.client(init(size="128x64")) as client:
        error = await client.error()
        assert (error["code"], "9.0 GB" in error["content"]) == ("capacity", True)
        assert not server.service.admission.is_busy
        await client.send(init(max_chunks=1))
        assert len((await client.chunk()).frames) == 9


# --- in the session ---


async def test_bad_events_change_nothing(serve):
    """A bad event gets its error; prompt and camera of the following chunks are as before."""
    server = await serve(FakeEngine(group_s=SLOW))
    bad = [
        event("dance"),
        event("prompt", ""),
        event("camera_actions", [["w"], ["x"]]),
        event("composite_input", {"input_types": ["prompt", "camera_actions"], "prompt": "New.", "camera_actions": 3}),
        event("pause"),
        {"type": "event"},
        init(),
    ]
    async with server.client(init()) as client:
        for message in bad:
            await client.send(message)
            assert (await client.until("error"))["content"].startswith("invalid ")
        await client.chunk()
        await client.chunk()
    assert {plan.prompt for plan in server.engine.plans} == {"A quiet street."}
    assert all(plan.relative_poses is None for plan in server.engine.plans)


async def test_an_event_sent_with_the_init_counts(serve):
    """Clients send their first keys right behind the init: they are in the first chunk."""
    server = await serve(FakeEngine(open_s=0.05))
    async with server.client(init(), event("camera_actions", state("w"), 1)) as client:
        chunk = await client.chunk()
    assert chunk.stats["event_id"] == 1
    assert server.engine.plans[0].relative_poses is not None


async def test_an_event_before_any_init_is_refused(serve):
    """There is nothing it could act on, and the error says what is missing."""
    server = await serve()
    async with server.client(event("prompt", "x")) as client:
        assert "send an init first" in (await client.error())["content"]


async def test_a_prompt_event_is_in_force_from_the_next_chunk(serve):
    """The chunk that carries the event's id runs with the new prompt, the ones before with the old."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init()) as client:
        await client.receive()
        await client.send(event("prompt", "A river.", 5))
        while (chunk := await client.chunk()).stats["event_id"] is None:
            pass
    plans = server.engine.plans
    index = chunk.stats["chunk_index"]
    assert index >= 1
    assert [plan.prompt for plan in plans[: index + 1]] == ["A quiet street."] * index + ["A river."]


async def test_a_large_batch_is_followed_by_its_payload_and_nothing_else(serve):
    """Errors asked for in the middle of large two-message batches never come between header and payload."""
    server = await serve(FakeEngine(group_s=0.002))
    async with server.client(init(size="256x160", max_chunks=8)) as client:
        for _ in range(40):
            await client.send(event("dance"))
        frames = sum([len((await client.chunk()).frames) for _ in range(8)])
        await client.closed()
    assert frames == 9 + 7 * 12
    assert [message["type"] for message in client.seen] == ["error"] * len(client.seen)
    assert client.seen


async def test_max_chunks_ends_the_session(serve):
    """Everything is delivered, then close 1000 says that the generation is complete."""
    server = await serve()
    async with server.client(init(max_chunks=3)) as client:
        assert [len((await client.chunk()).frames) for _ in range(3)] == [9, 12, 12]
        assert await client.closed() == (1000, "generation complete")
    await server.idle()


async def test_an_engine_failure_is_told_then_closed_with_1011(serve):
    """The chunk before arrives whole; the error names what broke; the next session works."""
    server = await serve(FakeEngine(fail_at_chunk=1))
    async with server.client(init()) as client:
        assert len((await client.chunk()).frames) == 9
        error = await client.error()
        assert error["content"] == "error during generate loop: RuntimeError: out of fuel"
        assert (await client.closed())[0] == 1011
    server.engine.fail_at_chunk = None
    async with server.client(init(max_chunks=2)) as client:
        await client.chunk()
        await client.chunk()
        assert (await client.closed())[0] == 1000


async def test_statistics_add_up_to_the_wall_time(serve):
    """The chunk times of a session follow one another: their sum is the time that passed, no more and no less."""
    server = await serve(FakeEngine(group_s=0.005))
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with server.client(init(max_chunks=6, profile=True)) as client:
        stats = [(await client.chunk()).stats for _ in range(6)]
        passed_ms = 1000 * (loop.time() - started)
    assert sum(entry["chunk_total_ms"] for entry in stats) <= passed_ms + 6
    for entry in stats:
        assert entry["scheduler_forward_ms"] >= 15  # three latent frames of 5 ms
        assert entry["window_frames"] == 9
        assert set(entry["stages"]) == {"prepare", "denoise", "context"}
    assert sum(entry["chunk_total_ms"] for entry in stats) >= sum(entry["scheduler_forward_ms"] for entry in stats) - 6


async def test_pacing_holds_a_fast_engine_back(serve):
    """With realtime_output_pacing frames leave no faster than fps, and what was waited for is in the statistics."""
    server = await serve()
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with server.client(init(max_chunks=3, fps=100, realtime_output_pacing=True)) as client:
        stats = [(await client.chunk()).stats for _ in range(3)]
    # 33 frames, of which the last four may leave when 29 have been shown
    assert loop.time() - started >= 0.29 - 0.01
    assert sum(entry["pace_wait_ms"] for entry in stats) > 100


async def test_an_event_is_not_held_up_by_pacing(serve):
    """A key pressed while paced frames wait is in the next frames at once: neither the generator's wait for the right
    moment nor the older frames' due times, seconds away, stand before it."""
    server = await serve()
    loop = asyncio.get_running_loop()
    async with server.client(init(fps=1, realtime_output_pacing=True)) as client:
        await client.receive()
        started = loop.time()
        await client.send(event("camera_actions", [["w"]], event_id=9))
        while (await client.receive())[0].get("event_id") != 9:
            pass
    # At one frame a second the rest of chunk 0 alone takes eight seconds.
    assert loop.time() - started < 6


# --- the end, in each state ---


async def test_a_client_that_leaves_frees_everything(serve):
    """Gone before the init, while opening, in mid-chunk or while paused: slot and engine are free each time."""
    server = await serve(FakeEngine(group_s=SLOW, open_s=SLOW))
    pausing = init(protocol_extensions=["pause"])
    moments = {
        "before the init": [],
        "while opening": [init()],
        "in mid-chunk": [init()],
        "while paused": [pausing, event("pause")],
    }
    for moment, messages in moments.items():
        for abrupt in (False, True):
            async with server.client(*messages) as client:
                if moment == "in mid-chunk":
                    await client.receive()
                if moment == "while paused":
                    await client.send(event("pause"))
                    await asyncio.sleep(3 * SLOW)
                if abrupt:
                    client.socket.transport.abort()
            await server.idle()
    assert len(server.engine.closed) == len(server.engine.opened)


async def test_a_reload_is_never_refused_by_its_own_old_socket(serve):
    """However long the old chunk takes to stop, the new socket waits for it instead of being refused."""
    server = await serve(FakeEngine(group_s=SLOW, close_s=0.3), session_wait_s=0.05)
    for _ in range(3):
        async with server.client(init()) as old:
            await old.receive()
            old.socket.transport.abort()
            async with server.client(init(max_chunks=1)) as new:
                assert len((await new.chunk()).frames) == 9
                assert (await new.closed())[0] == 1000


async def test_a_second_client_is_refused_in_words(serve):
    """After the wait: the reference's error, then close 1008; the first session is not disturbed."""
    server = await serve(FakeEngine(group_s=SLOW), session_wait_s=0.05)
    async with server.client(init()) as first:
        await first.receive()
        async with server.client(init()) as second:
            error = await second.error()
            assert error["content"] == "another realtime session is already active"
            assert error["code"] == "session_busy"
            assert (await second.closed())[0] == 1008
        await first.chunk()
        assert (await first.chunk()).stats["num_frames"] == 12


async def test_a_second_client_is_served_when_the_first_leaves(serve):
    """Within the wait the slot passes on, and the line is told with the extension ``queue``."""
    server = await serve(FakeEngine(group_s=SLOW), session_wait_s=5)
    async with server.client(init()) as first:
        await first.receive()
        async with server.client(init(max_chunks=1, protocol_extensions=["queue"])) as second:
            assert await second.until("queue") == {"type": "queue", "position": 1}
            await first.socket.close()
            assert len((await second.chunk()).frames) == 9


async def test_a_client_that_stops_reading_costs_only_itself(serve):
    """It loses its session after the limit; the next client is served; what was buffered stayed bounded."""
    server = await serve(FakeEngine(), send_timeout_s=0.5, session_wait_s=5)
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 8192)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, ("127.0.0.1", server.port))
    with raw:
        async with connect(server.ws, sock=raw, compression=None, max_queue=1, max_size=None, ping_interval=None) as it:
            await Client(it).send(init(size="640x384"))
            async with asyncio.timeout(10):
                while not server.engine.opened or server.engine.live:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert len(server.engine.plans) < 20
            async with server.client(init(max_chunks=1)) as other:
                assert len((await other.chunk()).frames) == 9
            it.transport.abort()
    await server.idle()


async def test_a_client_that_answers_no_ping_loses_its_session(serve, caplog):
    """A peer that vanished without a word is noticed by the keepalive, and leaves neither a session nor a traceback."""
    server = await serve(FakeEngine(group_s=SLOW))
    server.server.config.ws_ping_interval = server.server.config.ws_ping_timeout = 0.2
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    handshake = f"GET {ENDPOINT} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n"
    writer.write(handshake.encode())
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    writer.write(masked(msgspec.msgpack.encode(init())))
    async with asyncio.timeout(5):
        while not server.engine.live:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while await reader.read(65536):
            pass
    writer.close()
    await server.idle()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def masked(payload: bytes) -> bytes:
    """A binary WebSocket frame as clients send it, with a mask of zeros."""
    return b"\x82\xfe" + len(payload).to_bytes(2, "big") + bytes(4) + payload


async def test_shutdown_tells_the_session_first():
    """A running session gets an error, then close 1001; the engine is closed; the server ends."""
    engine = FakeEngine(group_s=SLOW)
    async with running(engine) as server, server.client(init()) as client:
        await client.receive()
        server.server.should_exit = True
        assert (await client.closed())[0] == 1001
        assert client.seen[-1]["code"] == "shutting_down"
    assert engine.live == 0
    assert engine.closed


# --- extensions ---


async def test_extensions_are_spoken_only_when_asked_for(serve):
    """Without them only the reference's four types are sent; with them come the introduction and the acks."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init(), event("camera_actions", state("w"), 1)) as client:
        await client.chunk()
        await client.chunk()
    assert client.seen == []
    asked = init(protocol_extensions=["session", "control_ack", "unheard-of"])
    async with server.client(asked, event("camera_actions", state("w"), 7)) as client:
        chunk = await client.chunk()
    kinds = [message["type"] for message in client.seen]
    assert kinds.count("session") == 1
    told = next(message for message in client.seen if message["type"] == "session")
    assert told["session_id"] == chunk.stats["session_id"]
    assert told["capabilities"]["extensions"] == ["session", "control_ack"]
    acks = [message for message in client.seen if message["type"] == "control_ack"]
    assert [(ack["state"], ack["event_id"], ack.get("chunk_index")) for ack in acks] == [
        ("received", 7, None),
        ("applied", 7, 0),
    ]


async def test_pause_holds_the_world_and_resume_goes_on(serve):
    """After a pause the chunk in work is finished and no other begins; resume continues with the next index."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init(protocol_extensions=["pause", "control_ack"])) as client:
        await client.receive()
        await client.send(event("pause", event_id=1))
        await client.until("control_ack")
        await asyncio.sleep(6 * SLOW)
        planned = len(server.engine.plans)
        await asyncio.sleep(6 * SLOW)
        assert len(server.engine.plans) == planned
        await client.send(event("resume", event_id=2))
        while (chunk := await client.chunk()).stats["chunk_index"] < planned:
            pass
    assert chunk.stats["chunk_index"] == planned


async def test_a_pause_that_lasts_too_long_ends_the_session(serve):
    """The error names the flag, the close is 1008, and whoever waits gets the slot."""
    server = await serve(FakeEngine(group_s=SLOW), pause_limit_s=1, session_wait_s=10)
    async with server.client(init(protocol_extensions=["pause"]), event("pause")) as client:
        async with server.client(init(max_chunks=1)) as waiting:
            assert len((await waiting.chunk()).frames) == 9
        error = await client.until("error")
        assert (error["code"], "--pause-limit-s" in error["content"]) == ("pause_expired", True)
        assert (await client.closed())[0] == 1008


async def test_every_event_of_a_chunk_comes_back_as_applied(serve):
    """Twenty events while one chunk runs: twenty "received", then twenty "applied" by the next chunk, in order."""
    server = await serve(FakeEngine(group_s=SLOW))
    async with server.client(init(protocol_extensions=["control_ack"])) as client:
        await client.receive()
        for number in range(20):
            await client.send(event("camera_actions", state("w" if number % 2 else "d"), number))
        while len(client.seen) < 40:
            await client.chunk()
    for acknowledged in ("received", "applied"):
        assert [ack["event_id"] for ack in client.seen if ack["state"] == acknowledged] == list(range(20))


async def test_a_heartbeat_comes_while_nothing_else_does(serve, monkeypatch):
    """A paused session with the extension ``heartbeat`` still shows that it lives."""
    monkeypatch.setattr("lingbot_rt.session.session.HEARTBEAT_S", 0.05)
    server = await serve(FakeEngine())
    async with server.client(init(protocol_extensions=["heartbeat", "pause"]), event("pause")) as client:
        beat = await client.until("heartbeat")
    assert beat["state"] == "paused"


# --- who may come in ---


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
