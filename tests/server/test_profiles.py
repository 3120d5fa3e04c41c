"""POST /debug/profile: who may, what is written, and what a wrong request is told."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from lingbot_rt.errors import EngineFailed
from lingbot_rt.server import profiles
from lingbot_rt.session.plan import EngineStatus
from tests.server.conftest import LIMIT_S, init, wait_until
from tests.server.fake_engine import FakeEngine

KEY = {"Authorization": "Bearer secret"}


async def post(server, chunks: str | None = None, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.http, timeout=LIMIT_S, verify=False) as client:
        path = "/debug/profile" if chunks is None else f"/debug/profile?chunks={chunks}"
        return await client.post(path, **({"headers": KEY} | options))


def message(answer: httpx.Response) -> str:
    return answer.json()["error"]["message"]


async def test_who_may_write_profiles(serve, tmp_path):
    """A server without a key or without a folder refuses, and so does one whose key is not given."""
    open_server = await serve(profile_dir=str(tmp_path))
    answer = await post(open_server, "1")
    assert (answer.status_code, "--api-key" in message(answer)) == (403, True)
    no_folder = await serve(api_key="secret")
    answer = await post(no_folder, "1")
    assert (answer.status_code, "--profile-dir" in message(answer)) == (403, True)
    server = await serve(api_key="secret", profile_dir=str(tmp_path))
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert (await post(server, "1", headers=headers)).status_code == 401
    assert (await post(server, "1&api_key=secret", headers={})).status_code == 401
    assert list(tmp_path.iterdir()) == []
    assert server.engine.plans == []


async def test_a_profile_of_a_session(serve, tmp_path):
    """The answer names the file without its folder; the file is whole, and nothing else is left."""
    server = await serve(FakeEngine(group_s=0.01), api_key="secret", profile_dir=str(tmp_path))
    async with server.client(init(), additional_headers=KEY, max_queue=None) as client:
        await client.chunk()
        answer = await post(server, "2")  # meanwhile nobody reads, and the engine must not wait for that
    told = answer.json()
    assert answer.status_code == 200
    assert told["chunks"] == 2
    (file,) = tmp_path.iterdir()
    assert (file.name, file.stat().st_size) == (told["file"], told["bytes"])
    assert file.read_text() == "2 chunks"
    assert str(tmp_path) not in answer.text


@pytest.mark.parametrize("chunks", ["0", "9", "-1", "1.5", "many", "", "1e9", "%C2%B2", "x" * 500])
async def test_a_wrong_number_is_named(serve, tmp_path, chunks):
    server = await serve(api_key="secret", profile_dir=str(tmp_path))
    answer = await post(server, chunks)
    assert answer.status_code == 400
    assert message(answer).startswith("chunks ")
    assert message(answer).endswith("expected 1 to 8")
    assert len(message(answer)) < 200


async def test_without_a_chunk_nothing_is_written(serve, tmp_path):
    """No session plays: the request is told so, and the next one may ask again."""
    server = await serve(api_key="secret", profile_dir=str(tmp_path))
    for _ in range(2):
        answer = await post(server)
        assert (answer.status_code, "no chunk" in message(answer)) == (504, True)
    assert list(tmp_path.iterdir()) == []


async def test_one_at_a_time(serve, tmp_path, monkeypatch):
    """A second request is refused while the first one waits."""
    server = await serve(api_key="secret", profile_dir=str(tmp_path))
    gate = asyncio.Event()
    asked = []

    async def waiting(chunks, file, limit_s) -> int:
        asked.append(chunks)
        await gate.wait()
        return 0

    monkeypatch.setattr(server.engine, "profile", waiting)
    first = asyncio.create_task(post(server, "3"))
    await wait_until(lambda: bool(asked))
    answer = await post(server, "1")
    assert (answer.status_code, "already" in message(answer)) == (409, True)
    gate.set()
    assert (await first).status_code == 504
    assert asked == [3]


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(28, "No space left on device", "/srv/secret"), 507), (EngineFailed("/srv/secret/lost"), 503)],
)
async def test_what_goes_wrong_is_told_without_paths(serve, tmp_path, error, status):
    server = await serve(FakeEngine(profile_error=error), api_key="secret", profile_dir=str(tmp_path))
    answer = await post(server, "1")
    assert answer.status_code == status
    assert "/srv" not in answer.text
    assert (await post(server, "1")).status_code == status  # not 409


async def test_a_server_that_loads_has_no_chunks(serve, tmp_path):
    engine = FakeEngine(loading=EngineStatus("loading weights", 0.5))
    server = await serve(engine, api_key="secret", profile_dir=str(tmp_path))
    answer = await post(server, "1")
    assert (answer.status_code, "loading weights" in message(answer)) == (503, True)


def test_the_folder_is_bounded(tmp_path):
    """The oldest traces and parts of broken ones go; other files of the folder stay."""
    names = [f"2026010{day}-120000-000000.trace.json.gz" for day in range(1, 9)]
    for name in (*names, "part-20260101-110000-000000.trace.json.gz", "notes.txt"):
        (tmp_path / name).write_text("old")
    part = tmp_path / "part-20260109-120000-000000.trace.json.gz"
    part.write_text("newest")
    assert profiles._keep(part, tmp_path / "20260109-120000-000000.trace.json.gz") == 6
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {*names[1:], "20260109-120000-000000.trace.json.gz", "notes.txt"}
    assert len(kept) == profiles.KEPT_PROFILES + 1
