"""The front: clients get a free replica, stay on it, wait in line for one, and hear of its loss."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.deploy import hold
from lingbot_rt.deploy.relay import Line, Relay
from lingbot_rt.deploy.summary import merged_entry, merged_metrics
from lingbot_rt.errors import ConfigError
from tests.deploy.conftest import FakePool
from tests.server.conftest import LIMIT_S, event, init, running, state, wait_until
from tests.server.fake_engine import FakeEngine


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return answer.read()


async def fetched(url: str, **headers: str) -> bytes:
    return await asyncio.to_thread(get, url, **headers)


def lives(front) -> list[int]:
    return [replica.engine.live for replica in front.replicas]


async def test_sessions_spread_and_a_third_waits(front):
    """Two clients get a replica each. A third hears its place, and plays once the first has left."""
    front = await front(2)
    async with (
        front.client(init()) as first,
        front.client(init()) as second,
    ):
        assert len((await first.chunk()).frames) == 9
        assert len((await second.chunk()).frames) == 9
        assert lives(front) == [1, 1]
        async with front.client(init(protocol_extensions=["queue"])) as third:
            assert (await third.until("queue"))["position"] == 1
            assert front.front.line.length == 1
            first.socket.transport.abort()
            assert (await third.until("queue"))["position"] == 0
            assert len((await third.chunk()).frames) == 9
            assert len((await second.chunk()).frames) == 12
            assert front.front.line.length == 0


async def test_a_session_stays_on_its_replica(front):
    """Keys of a client act on its own frames only, and all of its chunks come from one engine."""
    front = await front(2)
    async with front.client(init(max_chunks=3)) as client:
        await client.send(event("camera_actions", state("w"), event_id=7))
        chunks = [await client.chunk() for _ in range(3)]
        assert await client.closed() == (1000, "generation complete")
    assert sorted(len(replica.engine.opened) for replica in front.replicas) == [0, 1]
    assert 7 in [header.get("event_id") for chunk in chunks for header in chunk.headers]


async def test_who_does_not_wait_is_refused(front):
    """A client without the extension gets session_busy after --session-wait-s; so does one that finds the line full."""
    front = await front(1, session_wait_s=0.05, max_waiting=0)
    async with front.client(init()) as first:
        await first.chunk()
        for extensions in ([], ["queue"]):
            async with front.client(init(protocol_extensions=extensions)) as other:
                error = await other.error()
                assert error["code"] == "session_busy"
                assert ("--max-waiting 0" in error["content"]) == bool(extensions)
                assert await other.closed() == (1008, "busy")


async def test_what_a_client_sends_in_line_reaches_its_session(front):
    """An event that came while the client waited is in force in its first chunk."""
    front = await front(1)
    async with front.client(init()) as first:
        await first.chunk()
        async with front.client(init(protocol_extensions=["queue"])) as second:
            await second.until("queue")
            await second.send(event("camera_actions", state("w"), event_id=5))
            first.socket.transport.abort()
            assert {header.get("event_id") for header in (await second.chunk()).headers} == {5}


async def test_a_client_that_leaves_the_line_is_forgotten(front):
    """Its place passes on, and the replica is not taken for it."""
    front = await front(1)
    async with front.client(init()) as first:
        await first.chunk()
        async with front.client(init(protocol_extensions=["queue"])) as second:
            await second.until("queue")
            async with front.client(init(protocol_extensions=["queue"])) as third:
                assert (await third.until("queue"))["position"] == 2
                second.socket.transport.abort()
                assert (await third.until("queue"))["position"] == 1
                first.socket.transport.abort()
                await third.chunk()
    assert len(front.replicas[0].engine.opened) == 2


async def test_a_lost_replica_ends_its_own_session_only(front):
    """Its client gets an error and close 1011. The other one plays on."""
    front = await front(2)
    async with front.client(init()) as one, front.client(init()) as two:
        await one.chunk()
        await two.chunk()
        lost = front.replicas[0]
        for connection in list(lost.server.server_state.connections):
            connection.transport.abort()
        ends = {}
        for name, client in (("one", one), ("two", two)):
            seen: list[str] = []
            while len(seen) < 40 and "error" not in seen:
                seen.append((await client.receive())[0]["type"])
            ends[name] = "error" in seen
            if ends[name]:
                assert await client.closed() == (1011, "engine error")
        assert sorted(ends.values()) == [False, True]


async def test_a_replica_that_cannot_be_reached(front):
    """The client is told, without an address."""
    front = await front(0)
    front.pool.free.put_nowait("127.0.0.1:1")
    async with front.client(init()) as client:
        error = await client.error()
        assert error["code"] == "engine_failed"
        assert "127.0.0.1" not in error["content"]
        assert await client.closed() == (1011, "engine error")


@pytest.mark.parametrize(
    ("message", "code"),
    [(init(prompt=""), "invalid_init"), (event("prompt", "rain"), "invalid_event"), ("text", "invalid_init")],
)
async def test_a_wrong_first_message_takes_no_replica(front, message, code):
    """It is answered by the front, and the next init is served."""
    front = await front(1)
    async with front.client() as client:
        await (client.socket.send(message) if isinstance(message, str) else client.send(message))
        assert (await client.error())["code"] == code
        assert front.pool.free.qsize() == 1
        await client.send(init())
        assert len((await client.chunk()).frames) == 9


async def test_an_init_that_the_replica_refuses(front):
    """The replica's own error passes, and the client may send another init on the same connection."""
    front = await front(1)
    async with front.client(init(size="8000x8000")) as client:
        assert (await client.error())["code"] == "invalid_init"
        await client.send(init())
        assert len((await client.chunk()).frames) == 9


async def test_no_init(front):
    """A client that sends nothing is closed after --init-timeout-s, and holds no replica."""
    front = await front(1, init_timeout_s=0.5)
    async with front.client() as client:
        assert (await client.error())["code"] == "invalid_init"
        assert await client.closed() == (1008, "no init")
    assert front.pool.free.qsize() == 1


async def test_a_stop_between_lease_and_replica_is_heard(monkeypatch):
    """A client that is told to leave in this moment does not get a session."""
    reads, is_reading, may_end, connected = [init()], asyncio.Event(), asyncio.Event(), []

    class Client:
        async def receive(self):
            if reads:
                return {"type": "websocket.receive", "bytes": msgspec.msgpack.encode(reads.pop())}
            try:
                await asyncio.Future()
            finally:  # it is cancelled when there is a replica
                is_reading.set()
                await may_end.wait()

        async def send(self, message):
            pass

        async def close(self, code, reason):
            pass

    async def connect(self, address):
        connected.append(address)
        raise OSError

    monkeypatch.setattr(Relay, "_connect", connect)
    pool = FakePool(["127.0.0.1:1"])
    await pool.start()
    relay = Relay(Client(), ServeConfig(), pool, Line())
    serving = asyncio.create_task(relay.run())
    await is_reading.wait()
    relay.stop()
    await asyncio.sleep(0)
    may_end.set()
    async with asyncio.timeout(LIMIT_S):
        await serving
    assert connected == []
    assert pool.free.qsize() == 1


@pytest.mark.parametrize("poll_s", [0.005, 0.5], ids=["seen", "between two looks"])
async def test_who_says_nothing_holds_no_replica(monkeypatch, poll_s):
    """A stray connection to a replica: it is given to a client, and is free when that one's session is over, also if
    that came and went between two looks."""
    monkeypatch.setattr(hold, "POLL_S", poll_s)
    async with running(FakeEngine(), init_timeout_s=600) as server, server.client():
        await wait_until(lambda: len(server.service.connections) == 1)
        leases = hold.held(server.service, "here")
        assert await anext(leases) == "here"
        ending = asyncio.ensure_future(anext(leases, None))
        async with server.client(init()) as client:
            await client.chunk()
            assert not ending.done()
        assert await ending is None
        assert len(server.service.connections) == 1
        monkeypatch.setattr(hold, "CLAIM_LIMIT_S", -1000.0)  # less than the init may take
        assert [address async for address in hold.held(server.service, "here")] == ["here"]


async def test_at_the_end_every_client_is_told(front):
    """Those that play and those in line get the error shutting_down and close 1001."""
    front = await front(1)
    async with front.client(init()) as first, front.client(init(protocol_extensions=["queue"])) as second:
        await first.chunk()
        await second.until("queue")
        _, *ends = await asyncio.gather(front.front.close_all(30), first.closed(), second.closed())
        assert ends == 2 * [(1001, "server shutdown")]
        for client in (first, second):
            assert client.seen[-1]["code"] == "shutting_down"
    await wait_until(lambda: front.pool.free.qsize() == 1)


async def test_one_entry_and_one_metrics_page_for_all(front):
    """/v1/models says how many replicas there are and whether all are busy. Each sample says its replica."""
    front = await front(2)
    async with front.client(init()) as client:
        await client.chunk()
        [entry] = json.loads(await fetched(f"{front.http}/v1/models"))["data"]
        assert entry["id"] == "fake-world"
        assert (entry["busy"], entry["replicas"]) == (False, {"ready": 2, "busy": 1})
        assert json.loads(await fetched(f"{front.http}/v1/models/fake-world"))["replicas"] == entry["replicas"]
        families = {
            family.name: family
            for family in text_string_to_metric_families((await fetched(f"{front.http}/metrics")).decode())
        }
    assert {sample.labels["replica"] for sample in families["lingbot_rt_ready"].samples} == set(front.pool.known)
    assert sum(sample.value for sample in families["lingbot_rt_sessions"].samples if "total" in sample.name) == 1
    assert families["lingbot_rt_front_replicas"].samples[0].value == 2
    assert families["lingbot_rt_front_relayed_sessions"].samples[0].value == 1
    assert json.loads(await fetched(f"{front.http}/health"))["stage"] == "ready"
    assert b"<html" in await fetched(f"{front.http}/")


@pytest.mark.parametrize("path", [ENDPOINT, "/v1/models/nobody", "/health", "/liveness", "/index.html", "/none"])
async def test_a_front_answers_as_a_server_does(front, path):
    """Also a request for the WebSocket without an upgrade, a model that is not there, and the page."""
    front, answers = await front(1), []
    for port in (front.port, front.replicas[0].port):
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{port}{path}")
        told = {name: answer.headers.get(name) for name in ("upgrade", "cache-control", "content-type")}
        answers.append((answer.status_code, answer.content, told))
    assert answers[0] == answers[1]
    assert answers[0][0] == {ENDPOINT: 426, "/v1/models/nobody": 404, "/none": 404}.get(path, 200)


async def test_the_key_is_asked_for_and_passed_on(front):
    """Without it a WebSocket gets `unauthorized`, and HTTP 401. With it both reach the replicas."""
    front = await front(1, api_key="secret-key")
    async with front.client() as client:
        assert (await client.error())["code"] == "unauthorized"
        assert await client.closed() == (1008, "unauthorized")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        await fetched(f"{front.http}/v1/models")
    headers = {"Authorization": "Bearer secret-key"}
    async with front.client(init(), additional_headers=headers) as client:
        assert len((await client.chunk()).frames) == 9
    assert json.loads(await fetched(f"{front.http}/v1/models", **headers))["data"][0]["replicas"]["ready"] == 1


def test_metrics_are_merged_by_family():
    """The lines of a family stay together, comments come once, and labels with braces and blanks are kept."""
    text = '# HELP a_total what {x} it is\n# TYPE a_total counter\na_total{path="/{b} c"} 1.0\na_total 2.0\n'
    more = "# HELP b what\n# TYPE b gauge\nb 3.0\n"
    merged = merged_metrics({"r1": text + more, "r2": text})
    assert merged.splitlines() == [
        "# HELP a_total what {x} it is",
        "# TYPE a_total counter",
        'a_total{replica="r1",path="/{b} c"} 1.0',
        'a_total{replica="r1"} 2.0',
        'a_total{replica="r2",path="/{b} c"} 1.0',
        'a_total{replica="r2"} 2.0',
        "# HELP b what",
        "# TYPE b gauge",
        'b{replica="r1"} 3.0',
    ]


def test_entries_are_merged():
    """A ready replica speaks for all; one that loads counts as no free one."""
    loading, busy = {"id": "m", "ready": False, "busy": False}, {"id": "m", "ready": True, "busy": True, "device": "x"}
    merged = merged_entry([loading, busy], waiting=3)
    assert merged == busy | {"waiting": 3, "replicas": {"ready": 1, "busy": 1}}
    assert merged_entry([], waiting=0) is None


async def test_a_saved_world_goes_on_at_any_replica_and_a_token_at_none(front):
    """Replicas keep no sessions for clients that come back. A file brings its world along."""
    front = await front(1)
    async with front.client(init(protocol_extensions=["history", "pause"])) as client:
        await client.chunk()
        await client.send(event("save"))
        while (message := await client.receive())[0]["type"] != "world":
            pass
    saved = message[1]
    async with front.client({"type": "init", "resume": "a" * 43}) as client:
        error = await client.error()
        assert (error["code"], error["field"]) == ("invalid_init", "resume")
        assert "--ray-replicas" in error["content"]
        await client.send({"type": "init", "resume": saved, "realtime_output_format": "raw"})
        assert (await client.chunk()).stats["chunk_index"] == message[0]["chunk_index"]


@pytest.mark.parametrize("changes", [{"park_dir": "kept"}, {"max_sessions": 2}])
def test_options_that_a_front_cannot_keep_are_refused(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value} with --ray-replicas"):
        ServeConfig(ray_replicas=2, **changes)
