"""What goes wrong between the engine and the socket: one session ends in words, the next one is as ever."""

from __future__ import annotations

import threading

import numpy as np
from fastapi import WebSocketDisconnect

from lingbot_rt.server.connection import Connection
from lingbot_rt.session.camera_path import CameraPath
from lingbot_rt.session.session import Session
from lingbot_rt.telemetry import Metrics
from lingbot_rt.transport.encode import FrameEncoder
from lingbot_rt.transport.pacing import Pacer
from tests.server.conftest import init, wait_until
from tests.server.fake_engine import FakeEngine

STAGES = {
    "planning": (Session, "next_chunk"),
    "camera": (CameraPath, "extend"),
    "encode": (FrameEncoder, "encode"),
    "header": (Session, "frame_batch"),
    "pacing": (Pacer, "until_due"),
    "statistics": (Session, "stats"),
    "metrics": (Metrics, "count_chunk"),
}
"""Where a chunk can break outside of the engine: each is a name that the work goes through."""

FAULTS = (OSError(28, "No space left on device", "/srv/secret"), MemoryError())
WALK = init(max_chunks=1, condition_inputs={"camera_actions": [["w"]]})


async def test_a_fault_between_engine_and_socket_ends_one_session(serve, monkeypatch):
    """The client is told the kind of the error and closed with 1011; the next session has the frames it always has."""
    server = await serve()

    async def frames() -> np.ndarray:
        async with server.client(WALK) as client:
            chunk = await client.chunk()
            assert (await client.closed())[0] == 1000
            return np.stack(chunk.frames)

    expected = await frames()
    for stage, name in STAGES.items():
        for fault in FAULTS:

            def broken(*args, fault=fault, **options):
                raise fault

            with monkeypatch.context() as patch:
                patch.setattr(*name, broken)
                async with server.client(WALK) as client:
                    code, _ = await client.closed()
            error = client.seen[-1]
            assert (code, error["type"], error["code"]) == (1011, "error", "engine_failed"), stage
            assert type(fault).__name__ in error["content"], stage
            assert "/srv" not in error["content"]
            await server.idle()
        assert np.array_equal(await frames(), expected), stage


async def test_a_socket_that_breaks_at_any_message_ends_one_session(serve, monkeypatch):
    """Whichever message cannot be sent, the client counts as gone, and nothing of its session is left."""
    server, write = await serve(), Connection._write
    for place in range(4):
        sent = []

        async def breaks(self, data, *, more, place=place, sent=sent):
            if len(sent) == place:
                raise WebSocketDisconnect(1006)
            sent.append(data)
            await write(self, data, more=more)

        with monkeypatch.context() as patch:
            patch.setattr(Connection, "_write", breaks)
            async with server.client(WALK):
                await wait_until(lambda: not server.service.connections)
        await server.idle()
    async with server.client(WALK) as client:
        assert len((await client.chunk()).frames) == 9


async def test_an_encoder_that_hangs_holds_the_slot_no_longer_than_its_client(serve, monkeypatch):
    """Its client leaves, and the next one is served by another thread."""
    server, gate, encode = await serve(FakeEngine()), threading.Event(), FrameEncoder.encode
    stuck = threading.Event()

    def hangs(self, pixels, event_id):
        if not stuck.is_set():
            stuck.set()
            gate.wait(60)
        return encode(self, pixels, event_id)

    monkeypatch.setattr(FrameEncoder, "encode", hangs)
    async with server.client(WALK):
        await wait_until(stuck.is_set)
    await server.idle()
    async with server.client(WALK) as client:
        assert len((await client.chunk()).frames) == 9
    gate.set()
