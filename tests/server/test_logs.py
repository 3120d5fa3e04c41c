"""The log as JSON, and the last line of a session."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lingbot_rt.telemetry import configure_logging
from lingbot_rt.telemetry.logs import LoggedSession
from tests.server.conftest import event, init, state
from tests.server.fake_engine import FakeEngine
from tests.server.test_http import undo_logging


@contextmanager
def json_log(capsys) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Turns the JSON log on; what it gives reads the objects so far."""
    configure_logging("info", key="s3cret", log_format="json")
    try:
        yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        undo_logging()


async def test_the_last_line_of_a_session_has_its_figures(serve, capsys):
    """Every line of a connection has its session's id, and the last one says why it ended and what it was."""
    server = await serve()
    walk = init(max_chunks=2), event("camera_actions", state("w"), 1)
    with json_log(capsys) as log_lines:
        async with server.client(*walk) as client:
            await client.closed()
        await server.idle()
        lines = [line for line in log_lines() if line["logger"].startswith("lingbot_rt")]
    (plan,) = server.engine.opened
    assert {line["session"] for line in lines} == {plan.session_id}
    (last,) = (line for line in lines if "figures" in line)
    assert last is lines[-1]
    assert (last["level"], last["logger"]) == ("info", "lingbot_rt.telemetry.session")
    assert last["message"].startswith(f"session {plan.session_id} ended: complete after ")
    figures = last["figures"]
    assert (figures["ending"], figures["size"], figures["chunks"], figures["frames"]) == ("complete", "64x64", 2, 21)
    assert figures["events"] == 1
    assert 0 < figures["event_latency_ms"] == figures["longest_event_latency_ms"]
    assert set(figures["stages_ms"]) == {"prepare", "denoise", "context", "decode", "encode", "send"}
    assert figures["sent_bytes"] > 21 * 64 * 64 * 3


async def test_sessions_are_told_apart(serve, capsys):
    """Two connections at a time: each line has the id of its own one, and a client without a session has none."""
    server = await serve(FakeEngine(), session_wait_s=0)
    with json_log(capsys) as log_lines:
        async with server.client(init(), max_queue=None) as first:
            await first.chunk()
            async with server.client(init()) as second:
                assert (await second.closed())[0] == 1008
            async with server.client():
                pass
        await server.idle()
        lines = log_lines()
    ended = [line for line in lines if "figures" in line]
    assert [line["session"] for line in ended] == [server.engine.opened[0].session_id]
    assert ended[0]["figures"]["ending"] == "client_gone"
    refused = [line for line in lines if line.get("session") not in (None, ended[0]["session"])]
    assert all("ended" not in line["message"] for line in refused)
    assert any("session" not in line for line in lines if "client is gone" in line["message"])


async def test_a_session_in_words(serve, caplog):
    """The same line as text, also for a session that broke and had no keys."""
    caplog.set_level(logging.INFO, "lingbot_rt")
    server = await serve(FakeEngine(fail_at_chunk=1))
    async with server.client(init()) as client:
        await client.closed()
    await server.idle()
    (last,) = (record.getMessage() for record in caplog.records if " ended: " in record.getMessage())
    assert "ended: engine_failed after" in last
    assert "1 chunks, 9 frames" in last
    assert "no keys" in last


def test_any_line_is_one_object(capsys):
    """Line breaks, odd characters, tracebacks and keys: one line each, without the key."""
    log = logging.getLogger("any")
    with json_log(capsys) as log_lines:
        log.warning("two\nlines of \udcff and s3cret")
        try:
            raise ValueError("api_key=s3cret\nmore")
        except ValueError:
            log.exception("it broke")
        warning, error = log_lines()
    assert warning["message"] == "two\nlines of \udcff and ***"
    assert (error["level"], error["message"]) == ("error", "it broke")
    assert error["error"].startswith("Traceback")
    assert "ValueError" in error["error"]
    assert "s3cret" not in error["error"]
    assert warning["time"].endswith("+00:00")
    assert "session" not in warning


async def test_the_session_of_a_task_is_that_of_its_connection():
    """Tasks made after ``enter`` share the id, also when it is known only later; others have none."""
    logged = LoggedSession()

    async def connection() -> str | None:
        logged.enter()
        task = asyncio.create_task(seen())
        logged.session_id = "abc"
        return await task

    async def seen() -> str | None:
        current = LoggedSession.current.get()
        return None if current is None else current.session_id

    assert await asyncio.create_task(connection()) == "abc"
    assert await asyncio.create_task(seen()) is None
