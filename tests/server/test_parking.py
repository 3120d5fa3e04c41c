"""``Parking`` by itself: what happens to a session while another thing is done with it."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidInit
from lingbot_rt.server.parking import Parking
from lingbot_rt.server.serving import Start
from tests.server.conftest import LIMIT_S, event, init, running, wait_until
from tests.server.fake_engine import FakeEngine
from tests.server.test_kept_worlds import KEPT, SLOW, lost, resume, token_of


class HeldSnapshots(FakeEngine):
    """Its snapshots wait for ``may_snapshot``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.may_snapshot, self.broken = threading.Event(), False
        self.begun = 0

    async def snapshot(self, session_id: str, about: str) -> bytes:
        self.begun += 1
        await asyncio.to_thread(self.may_snapshot.wait, LIMIT_S)
        if self.broken:
            raise MemoryError("no memory")
        return await super().snapshot(session_id, about)


async def test_a_world_whose_time_is_over_while_it_becomes_a_snapshot_ends(serve):
    """Nobody would ever end it otherwise."""
    engine = HeldSnapshots(group_s=SLOW, parked_bytes=2**21)
    server = await serve(engine, parked_mb=1)
    async with lost(server, init(**KEPT)) as client:
        await token_of(client)
    await wait_until(lambda: engine.begun == 1)
    parking = server.service.parking
    (kept,) = parking._kept.values()
    assert kept.timer is not None
    kept.timer.cancel()
    parking._in_background(kept, parking._expire(kept))  # what the timer does
    await asyncio.sleep(0)
    engine.may_snapshot.set()
    await wait_until(lambda: not parking._kept)
    assert kept.is_over


async def test_a_snapshot_that_breaks_holds_up_nobody(serve, caplog):
    """Whoever waits for the world hears that it is over."""
    engine = HeldSnapshots(group_s=SLOW, parked_bytes=2**21)
    server = await serve(engine, parked_mb=1)
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
    await wait_until(lambda: engine.begun == 1)
    async with server.client(resume(token)) as client:
        engine.broken = True
        engine.may_snapshot.set()
        assert (await client.error())["field"] == "resume"
    await server.idle()


async def test_a_session_that_cannot_be_parked_holds_up_nobody(serve, caplog, monkeypatch):
    """Whatever breaks: its token says that it is over, and the log has the traceback."""
    server = await serve(FakeEngine(group_s=SLOW))

    async def breaks(session_id: str) -> int:
        raise RuntimeError("broken")

    monkeypatch.setattr(server.engine, "park", breaks)
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
    async with server.client(resume(token)) as client:
        assert (await client.error())["field"] == "resume"
    await server.idle()
    assert "RuntimeError: broken" in caplog.text


async def test_a_stop_writes_the_others_if_one_breaks(tmp_path, caplog):
    """Each for itself; the file that the broken one had stays."""
    engine = HeldSnapshots(group_s=SLOW)
    async with running(engine, park_dir=str(tmp_path)) as server:
        for number in range(2):
            async with lost(server, init(**KEPT)) as client:
                await token_of(client)
            await wait_until(lambda number=number: server.service.parking.count == number + 1)
        first, second = server.service.parking._kept
        (tmp_path / f"{first}.world").write_bytes(b"older")
        engine.may_snapshot.set()
        engine.broken = True
        whole = engine.snapshot

        async def only_the_first_breaks(session_id: str, about: str) -> bytes:
            try:
                return await whole(session_id, about)
            finally:
                engine.broken = False

        engine.snapshot = only_the_first_breaks
    assert (tmp_path / f"{first}.world").read_bytes() == b"older"
    assert (tmp_path / f"{second}.world").stat().st_size > 10
    assert "MemoryError: no memory" in caplog.text


async def test_a_stop_does_not_write_over_a_snapshot_that_is_written(tmp_path):
    """Two writers of one file would mix their bytes."""
    may_write, first_begun, order = threading.Event(), threading.Event(), []
    async with running(FakeEngine(group_s=SLOW), park_dir=str(tmp_path), snapshot_every=1) as server:
        parking = server.service.parking
        folder = parking._folder
        write = folder.write

        def slow(digest: str, data: bytes) -> bool:
            order.append("begin")
            if not first_begun.is_set():
                first_begun.set()
                may_write.wait(LIMIT_S)
            done = write(digest, data)
            order.append("end")
            return done

        folder.write = slow
        async with lost(server, init(**KEPT)) as client:
            await token_of(client)
            await wait_until(first_begun.is_set)
        await wait_until(lambda: parking.count == 1)
        closing = asyncio.create_task(parking.close())
        done, _ = await asyncio.wait({closing}, timeout=0.3)
        may_write.set()
        assert not done
        await closing
        assert order == ["begin", "end", "begin", "end"]


async def test_worlds_on_disk_are_known_before_the_engine_is_ready(tmp_path):
    """A client that comes back in the moment in which the model is loaded must not hear that its session is over."""
    token = "t" * 43
    parking = Parking(ServeConfig(park_dir=str(tmp_path)), FakeEngine())
    (tmp_path / f"{parking._digest(token)}.world").write_bytes(b"")
    await parking.find()
    kept, offer = await parking.claim(token, lambda: None)
    assert offer.token == token
    parking.started()
    assert kept.timer is None  # somebody has it
    with pytest.raises(InvalidInit, match="no session has this token"):
        await parking.claim("other", lambda: None)


async def test_a_world_that_became_a_snapshot_has_no_older_branches(serve):
    """The engine keeps none of them: a camera of another branch would be taken for that of this one."""
    server = await serve(FakeEngine(group_s=SLOW, parked_bytes=2**21), parked_mb=1)
    async with lost(server, init(**KEPT)) as client:
        token = await token_of(client)
        while (await client.chunk()).stats["chunk_index"] < 5:
            pass
        await client.send(event("branch", {"chunk": 1}))
        assert (await client.until("rewound"))["branch"] == 1
    await wait_until(lambda: bool(server.engine.snapshots) and server.service.parking.count == 1)
    async with server.client(resume(token)) as client:
        await client.until("session")
        await client.send(event("rewind", {"chunk": 0, "branch": 0}, event_id=7))
        error = await client.until("error")
        assert (error["field"], error["event_id"]) == ("chunk", 7)
        assert "0 is not kept" in error["content"]
        # The file that it came from is not kept beside the session.
        starts = [each for each in gc.get_objects() if type(each) is Start]  # some are dead proxies
        assert starts
        assert all(each.world is None for each in starts)
