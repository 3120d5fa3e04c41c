"""A session that outlives its line, and what goes back, branches and saves: against a server that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from lingbot_rt.client import EventRefused, InitRefused, KeyRefused, SaveFailed, SessionLost, connect
from lingbot_rt.client.kept import EventsInFlight, ReceivedFrames, Retry
from lingbot_rt.errors import OutputFailed
from tests.client.test_connect import INIT, model_entry, serving, stats

pack = msgspec.msgpack.encode
unpack = msgspec.msgpack.decode
TOKEN = "t" * 43
NEEDED = ["session", "control_ack", "history"]
ENTRY = {"process_request": model_entry(json.dumps({"data": [{"extensions": [*NEEDED, "queue"]}]}))}
CHUNKS, FRAMES = 5, 3  # of the fake world, and frames per chunk


def cut(connection: ServerConnection) -> None:
    """Breaks the line without a close."""
    connection.socket.shutdown(socket.SHUT_RDWR)


def opened(resume_s: float = 30, **fields: object) -> bytes:
    capabilities = {"extensions": NEEDED}
    return pack({"type": "session", "resume_token": TOKEN, "resume_s": resume_s, "capabilities": capabilities} | fields)


def frames(first: int, chunk_index: int, count: int) -> Iterator[bytes]:
    """Frames whose first pixel is their number in the world, as a header and a payload of its own."""
    header = {"content_type": "application/x-raw-rgb", "num_frames": count, "width": 2, "height": 1}
    yield pack({"type": "frame_batch_header", "chunk_index": chunk_index, **header})
    yield b"".join(bytes([first + i, 0, 0, 0, 0, 0]) for i in range(count))


class FakeWorld:
    """Plays CHUNKS chunks. Connection n breaks after n messages of it; the next one goes on where the client says."""

    def __init__(self, limit: Callable[[int], int] = lambda connection: connection) -> None:
        self.inits: list[dict] = []
        self._limit = limit

    def __call__(self, connection: ServerConnection) -> None:
        init = unpack(connection.recv())
        self.inits.append(init)
        seen = FRAMES * init["received_chunk"] + init["received_frames"] if "resume" in init else 0
        connection.send(opened(resumed="resume" in init, chunk_index=seen // FRAMES))
        allowed = self._limit(len(self.inits))
        for number, message in enumerate(self._messages(seen)):
            if number == allowed:
                cut(connection)
                return
            connection.send(message)
        connection.close(1000, "generation complete")

    def _messages(self, seen: int) -> Iterator[bytes]:
        for chunk_index in range(seen // FRAMES, CHUNKS):
            end = FRAMES * (chunk_index + 1)
            while seen < end:
                count = min(2, end - seen)  # batches of 2 and of 1
                yield from frames(seen, chunk_index, count)
                seen += count
            yield stats(chunk_index)


def test_a_lost_line_costs_no_frame():
    """The line breaks after every message of the stream, also between a header and its payload.

    Each frame comes once and in order, with the place in the whole session.
    """
    world = FakeWorld()
    with serving(world, **ENTRY) as url, connect(url, **INIT) as session:
        seen = [(frame.index, int(frame.pixels[0, 0, 0]), frame.chunk_index) for frame in session]
        assert session.resume_token == TOKEN
        assert [place.exact for place in session.resumes] == [True] * (len(world.inits) - 1)
    assert seen == [(i, i, i // FRAMES) for i in range(CHUNKS * FRAMES)]
    assert len(world.inits) > 5
    assert "resume" not in world.inits[0]
    assert world.inits[0]["protocol_extensions"] == NEEDED
    assert all(init["resume"] == TOKEN for init in world.inits[1:])
    assert all("prompt" not in init and "first_frame" not in init for init in world.inits[1:])
    assert world.inits[1]["protocol_extensions"] == [*NEEDED, "queue"]


async def test_a_lost_line_costs_an_async_session_no_frame():
    """The same on an event loop."""
    world = FakeWorld()
    with serving(world, **ENTRY) as url:
        async with connect(url, **INIT) as session:
            seen = [int(frame.pixels[0, 0, 0]) async for frame in session]
    assert seen == list(range(CHUNKS * FRAMES))
    assert len(world.inits) > 5


@pytest.mark.parametrize("extensions", [None, [], ["session", "queue", "control_ack"]])
def test_a_server_that_keeps_no_worlds_sees_no_change(extensions):
    """It gets the init of before, and a lost line is a lost session."""
    inits: list[dict] = []

    def script(connection: ServerConnection) -> None:
        inits.append(unpack(connection.recv()))
        cut(connection)

    options = (
        {}
        if extensions is None
        else {"process_request": model_entry(json.dumps({"data": [{"extensions": extensions}]}))}
    )
    with serving(script, **options) as url, connect(url, **INIT) as session, pytest.raises(SessionLost):
        next(session)
    (init,) = inits
    assert set(init) == {"type", "condition_inputs", *INIT}


def test_extensions_of_the_caller_are_sent_as_they_are():
    """Nothing is added to them."""
    inits: list[dict] = []

    def script(connection: ServerConnection) -> None:
        inits.append(unpack(connection.recv()))
        connection.close()

    with serving(script, **ENTRY) as url, connect(url, protocol_extensions=["warning"], **INIT) as session:
        list(session)
    assert inits[0]["protocol_extensions"] == ["warning"]


@pytest.mark.parametrize(
    ("content", "code", "close"),
    [
        ("error during generate loop: out of memory", "engine_failed", 1011),
        ("the session goes on in another client", "resumed_elsewhere", 1008),
        ("paused for longer than 300 s", "pause_expired", 1008),
    ],
)
def test_a_session_that_the_server_ends_is_not_resumed(content, code, close):
    """After an error of the server the caller gets that error, and no second line is opened."""
    lines = []

    def script(connection: ServerConnection) -> None:
        lines.append(unpack(connection.recv()))
        connection.send(opened())
        connection.send(pack({"type": "error", "content": content, "code": code}))
        connection.close(close, "why")

    with serving(script, **ENTRY) as url, connect(url, **INIT) as session, pytest.raises(SessionLost, match=content):
        next(session)
    assert len(lines) == 1


async def test_a_refused_resume_is_a_lost_session():
    """The message is the server's. The next event is refused with it too, and nothing is tried again."""
    lines = []

    def script(connection: ServerConnection) -> None:
        lines.append(unpack(connection.recv()))
        if len(lines) % 2:
            connection.send(opened())
            cut(connection)
            return
        content = "invalid generate request: resume: parked for longer than --resume-s"
        connection.send(pack({"type": "error", "content": content, "code": "invalid_init"}))
        with contextlib.suppress(ConnectionClosed):
            connection.recv()

    with serving(script, **ENTRY) as url:
        with connect(url, **INIT) as session:
            with pytest.raises(SessionLost, match="parked for longer than"):
                next(session)
            with pytest.raises(SessionLost):
                session.press("w")
        async with connect(url, **INIT) as session:
            with pytest.raises(SessionLost, match="parked for longer than"):
                await anext(session)
            with pytest.raises(SessionLost):
                await session.press("w")
    assert len(lines) == 4


def test_a_server_that_restarts_is_waited_for():
    """Shut down with an error, then still loading, then there: the session goes on."""
    inits: list[dict] = []

    def script(connection: ServerConnection) -> None:
        inits.append(unpack(connection.recv()))
        match len(inits):
            case 1:
                connection.send(opened())
                connection.send(
                    pack({"type": "error", "content": "the server is shutting down", "code": "shutting_down"})
                )
                connection.close(1001)
            case 2:
                connection.send(
                    pack({"type": "error", "content": "the server is not ready: loading", "code": "not_ready"})
                )
                with contextlib.suppress(ConnectionClosed):
                    connection.recv()
            case _:
                connection.send(pack({"type": "queue", "position": 1}))
                connection.send(opened(resumed=True, chunk_index=0, exact=False))
                for message in frames(0, 0, 1):
                    connection.send(message)
                connection.close()

    with serving(script, **ENTRY) as url, connect(url, **INIT) as session:
        assert len(list(session)) == 1
        assert [place.exact for place in session.resumes] == [False]
    assert len(inits) == 3


def test_a_server_that_stays_away_is_a_lost_session():
    """After ``resume_s`` the caller gets what ended the line."""
    gone = threading.Event()

    def script(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(opened(resume_s=0))
        connection.recv()
        cut(connection)
        gone.set()

    with contextlib.ExitStack() as server:
        url = server.enter_context(serving(script, **ENTRY))
        with connect(url, **INIT) as session:
            session.press("w")
            assert gone.wait(30)
            server.close()
            with pytest.raises(SessionLost, match="the connection broke"):
                next(session)


def test_leaving_ends_a_session_that_tries_to_come_back():
    """``close`` from another thread ends the tries at once."""
    tried = threading.Event()
    lines = []

    def script(connection: ServerConnection) -> None:
        lines.append(unpack(connection.recv()))
        if len(lines) == 1:
            connection.send(opened(resume_s=10_000))
        else:
            tried.set()
        cut(connection)

    with serving(script, **ENTRY) as url, connect(url, **INIT) as session:

        def leave() -> None:
            tried.wait(30)
            session.close()

        thread = threading.Thread(target=leave)
        thread.start()
        with pytest.raises(SessionLost):
            next(session)
        thread.join()


@pytest.mark.parametrize("is_async", [False, True])
def test_leaving_ends_a_session_that_waits_in_line_to_come_back(is_async):
    """The new line is closed too: the server would play on for nobody."""
    waits, left = threading.Event(), threading.Event()
    codes = []

    def script(connection: ServerConnection) -> None:
        if "resume" not in unpack(connection.recv()):
            connection.send(opened(resume_s=10_000))
            cut(connection)
            return
        connection.send(pack({"type": "queue", "position": 1, "waited_ms": 0}))
        waits.set()
        left.wait(30)
        with contextlib.suppress(ConnectionClosed):
            connection.send(opened(resumed=True, chunk_index=0))
            connection.recv(30)
        codes.append(connection.close_code)

    async def leave_async(url: str) -> None:
        async with connect(url, **INIT) as session:
            frames = asyncio.create_task(anext(session))
            await asyncio.to_thread(waits.wait, 30)
            await session.close()
            left.set()
            with pytest.raises(SessionLost):
                await frames

    def leave() -> None:
        waits.wait(30)
        session.close()
        left.set()

    with serving(script, **ENTRY) as url:
        if is_async:
            asyncio.run(leave_async(url))
        else:
            with connect(url, **INIT) as session:
                thread = threading.Thread(target=leave)
                thread.start()
                with pytest.raises(SessionLost):
                    next(session)
                thread.join()
    assert codes == [1000]


def test_events_that_the_server_did_not_hear_are_sent_again():
    """Those that it acknowledged are not; those of the time without a line come too, all in order."""
    heard: list[list[str]] = []
    is_cut = threading.Event()

    def events(connection: ServerConnection, count: int) -> list[dict]:
        return [unpack(connection.recv()) for _ in range(count)]

    def script(connection: ServerConnection) -> None:
        init = unpack(connection.recv())
        connection.send(opened(resumed="resume" in init))
        if "resume" not in init:
            got = events(connection, 3)
            heard.append([event["payload"] for event in got])
            connection.send(pack({"type": "control_ack", "state": "received", "event_id": got[0]["event_id"]}))
            connection.send(pack({"type": "error", "content": "invalid event: no", "code": "invalid_event"}))
            for message in frames(0, 0, 1):
                connection.send(message)
            cut(connection)
            is_cut.set()
            return
        heard.append([event["payload"] for event in events(connection, 2)])
        for message in frames(1, 0, 1):
            connection.send(message)
        connection.close()

    with serving(script, **ENTRY) as url, connect(url, **INIT) as session:
        for text in ("heard", "refused", "not heard"):
            session.prompt(text)
        with pytest.raises(EventRefused):
            next(session)
        assert next(session).index == 0
        assert is_cut.wait(30)
        while not isinstance(session._socket.close_code, int):  # the end of the line was noticed
            session._socket.recv_events_thread.join(0.01)
        session.prompt("without a line")
        assert [frame.index for frame in session] == [1]
    assert heard == [["heard", "refused", "not heard"], ["not heard", "without a line"]]


def saving(connection: ServerConnection) -> None:
    """Answers a ``save`` after some frames, which come while it waits; then ends."""
    connection.recv()
    connection.send(opened())
    for message in frames(0, 0, 2):
        connection.send(message)
    event = unpack(connection.recv())
    assert (event["kind"], event["payload"]) == ("save", None)
    connection.send(pack({"type": "control_ack", "state": "received", "event_id": event["event_id"]}))
    for message in frames(2, 0, 2):
        connection.send(message)
    connection.send(stats(0))
    connection.send(pack({"type": "world", "chunk_index": 1, "event_id": event["event_id"], "payload": b"a world"}))
    for message in frames(4, 1, 1):
        connection.send(message)
    connection.close()


async def test_save_writes_the_world_and_keeps_the_frames(tmp_path):
    """Frames that come before the answer are iterated after it. Blocking, async, and from another thread."""
    with serving(saving, **ENTRY) as url:
        with connect(url, **INIT) as session:
            next(session)
            assert session.save(tmp_path / "blocking") == 1
            assert [int(frame.pixels[0, 0, 0]) for frame in session] == [1, 2, 3, 4]
        async with connect(url, **INIT) as session:
            await anext(session)
            assert await session.save(tmp_path / "async") == 1
            assert [int(frame.pixels[0, 0, 0]) async for frame in session] == [1, 2, 3, 4]
        with connect(url, **INIT) as session:
            saved = []
            thread = threading.Thread(target=lambda: saved.append(session.save(tmp_path / "thread")))
            seen = [int(next(session).pixels[0, 0, 0])]
            thread.start()
            seen += [int(frame.pixels[0, 0, 0]) for frame in session]
            thread.join()
            assert (saved, seen) == ([1], [0, 1, 2, 3, 4])
        async with connect(url, **INIT) as session:
            await anext(session)
            saver = asyncio.create_task(session.save(tmp_path / "task"))
            assert [int(frame.pixels[0, 0, 0]) async for frame in session] == [1, 2, 3, 4]
            assert await saver == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["async", "blocking", "task", "thread"]
    assert all((tmp_path / name).read_bytes() == b"a world" for name in names)


def test_saves_that_fail(tmp_path):
    """A refusal, an end of the session, no answer, and a folder that is none each raise a named error."""

    def script(answer: Callable[[ServerConnection], object]) -> Callable[[ServerConnection], None]:
        def run(connection: ServerConnection) -> None:
            connection.recv()
            connection.send(opened())
            connection.recv()
            with contextlib.suppress(ConnectionClosed):
                answer(connection)
                connection.recv()

        return run

    refusal = pack(
        {"type": "error", "content": "invalid event: kind: save: needs --history-mb", "code": "invalid_event"}
    )
    cases: list[tuple[Callable[[ServerConnection], object], type[Exception], str]] = [
        (lambda it: it.send(refusal), EventRefused, "--history-mb"),
        (lambda it: it.close(), SaveFailed, "ended"),
        (lambda it: [it.send(stats(i)) for i in range(40)], SaveFailed, "did not answer"),
        (lambda it: it.send(pack({"type": "control_ack", "state": "dropped", "event_id": 1})), SaveFailed, "dropped"),
    ]
    for answer, kind, text in cases:
        with (
            serving(script(answer), **ENTRY) as url,
            connect(url, **INIT) as session,
            pytest.raises(kind, match=text),
        ):
            session.save(tmp_path / "world")
    with (
        serving(script(lambda it: None), **ENTRY) as url,
        connect(url, **INIT) as session,
        pytest.raises(SaveFailed, match="did not answer"),
    ):
        session.save(tmp_path / "world", limit_s=0.01)
    with serving(saving, **ENTRY) as url, connect(url, **INIT) as session:
        next(session)
        with pytest.raises(OutputFailed, match="No such file"):
            session.save(tmp_path / "missing" / "world")
        assert len(list(session)) == 4
    assert list(tmp_path.iterdir()) == []


def test_rewind_and_branch():
    """They are events; frames go on at the chunk, and a line that breaks then tells the frames before it."""
    heard: list[dict] = []

    def script(connection: ServerConnection) -> None:
        init = unpack(connection.recv())
        if "resume" in init:
            heard.append({name: init.get(name) for name in ("received_chunk", "received_frames")})
            connection.send(opened(resumed=True, chunk_index=1))
            connection.close()
            return
        connection.send(opened())
        for chunk_index in range(3):
            for message in frames(3 * chunk_index, chunk_index, 3):
                connection.send(message)
        for place in ({"chunk_index": 1, "branch": 0}, {"chunk_index": 1, "branch": 1, "exact": False}):
            event = unpack(connection.recv())
            heard.append({name: event[name] for name in ("kind", "payload")})
            connection.send(pack({"type": "rewound", "event_id": event["event_id"], **place}))
        for message in frames(100, 1, 1):
            connection.send(message)
        cut(connection)

    with serving(script, **ENTRY) as url, connect(url, **INIT) as session:
        session.rewind(1)
        session.branch(1, branch=0)
        assert [frame.chunk_index for frame in session] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 1]
        assert [(place.chunk_index, place.branch, place.exact) for place in session.rewinds] == [
            (1, 0, True),
            (1, 1, False),
        ]
    assert heard == [
        {"kind": "rewind", "payload": {"chunk": 1}},
        {"kind": "branch", "payload": {"chunk": 1, "branch": 0}},
        {"received_chunk": 1, "received_frames": 1},
    ]


def test_connect_goes_on_with_a_file_or_a_token(tmp_path):
    """A path, the bytes of a file and a token; output fields stand beside them. Nothing else is sent."""
    inits: list[dict] = []

    def script(connection: ServerConnection) -> None:
        inits.append(unpack(connection.recv()))
        connection.close()

    file = tmp_path / "world.safetensors"
    file.write_bytes(b"a world")
    with serving(script, **ENTRY) as url:
        for resume in (file, str(file), b"a world", TOKEN):
            with connect(url, resume=resume, realtime_output_format="raw", script=None) as session:
                list(session)
    assert [init.pop("resume") for init in inits] == [b"a world"] * 3 + [TOKEN]
    rest = {"type": "init", "realtime_output_format": "raw", "protocol_extensions": NEEDED}
    assert inits == [rest] * 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"resume": TOKEN, "prompt": "A street."}, "'prompt': a kept world has its own"),
        ({"resume": TOKEN, "script": [["w"]]}, "'script'"),
        ({"resume": "no/such/file"}, "'no/such/file': No such file.*expected a saved world or the token"),
        ({"resume": "no\0file"}, "no path of a file"),
        ({"resume": "/"}, "Is a directory"),
    ],
)
def test_wrong_resumes_are_refused_at_once(arguments, named):
    with pytest.raises(InitRefused, match=named):
        connect("http://127.0.0.1:1", **arguments)


def test_a_key_that_is_refused_meanwhile():
    """The error is the key's, not a lost session."""
    lines = []

    def script(connection: ServerConnection) -> None:
        lines.append(unpack(connection.recv()))
        if len(lines) == 1:
            connection.send(opened())
            cut(connection)
            return
        connection.send(pack({"type": "error", "content": "a valid API key is needed", "code": "unauthorized"}))
        connection.close(1008)

    with serving(script, **ENTRY) as url, connect(url, **INIT) as session, pytest.raises(KeyRefused):
        next(session)


def test_what_is_kept():
    """The newest chunk of the line that the session is on, and a bounded number of events without an answer."""
    received, events = ReceivedFrames(), EventsInFlight()
    assert received.fields() == {"received_chunk": 0, "received_frames": 0}
    for number in range(10_000):
        received.add(number // 2, 3)
        events.add(number, "prompt", b"x")
    assert received.fields() == {"received_chunk": 4999, "received_frames": 6}
    received.resumed_at(4999)
    assert received.fields() == {"received_chunk": 4999, "received_frames": 6}
    received.resumed_at(4000)
    assert received.fields() == {"received_chunk": 4000, "received_frames": 0}
    received.went_on_at(5000)
    assert received.fields() == {"received_chunk": 5000, "received_frames": 0}
    assert len(events.take_all()) == 1024
    assert events.refused(9999) == 9999  # the server says which one
    assert events.refused(9999) == events.refused() - 1 == 8976  # of one that is not known, the oldest


def test_when_a_lost_line_is_tried():
    """At once, then ever more rarely, and never beyond the limit; a server that loads starts the time anew."""
    retry, now, delays = Retry(10, 0), 0.0, []
    while (delay := retry.delay_s(now)) is not None:
        delays.append(delay)
        now += delay
        if len(delays) == 4:
            retry.server_loads(now)
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert 1.75 + 6 <= sum(delays) <= 1.75 + 10
    assert Retry(0, 0).delay_s(100) == 0
