"""A connection before its session: inits that are refused, late, too early or too large for the engine."""

from __future__ import annotations

import tracemalloc

import pytest

from lingbot_rt.session.plan import EngineStatus
from tests.server.conftest import event, init, png, wait_until
from tests.server.fake_engine import FakeEngine

SLOW = 0.02
"""Seconds per latent frame: slow enough to meet a chunk in the middle."""


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
    server = await serve(init_timeout_s=0.5)
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


async def test_an_event_before_any_init_is_refused(serve):
    """There is nothing it could act on, and the error says what is missing."""
    server = await serve()
    async with server.client(event("prompt", "x")) as client:
        assert "send an init first" in (await client.error())["content"]


async def test_a_client_in_line_keeps_no_picture(serve):
    """The bytes of a first frame are let go once they are decoded: however many clients wait, they hold no files."""
    server, size = await serve(session_wait_s=60), 8 * 2**20
    big = init(first_frame=png() + bytes(size))
    server.engine.may_open.clear()
    async with server.client(init()):
        await wait_until(lambda: server.engine.opening)
        tracemalloc.start()
        try:
            async with server.client(big):
                await wait_until(lambda: server.service.admission.waiting == 1)
                # The message itself goes with the next look at the session.
                await wait_until(lambda: tracemalloc.get_traced_memory()[0] < size / 2)
                assert tracemalloc.get_traced_memory()[1] > size
        finally:
            tracemalloc.stop()
            server.engine.may_open.set()
