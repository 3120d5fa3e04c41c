"""A world that is kept: after a lost line, a reload and a restart, back to an earlier place, as a file."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from pathlib import Path

import pytest

from lingbot_rt.session.world_file import read_world
from tests.browser.conftest import BUILTIN
from tests.browser.sites import CutLine, FakeApi, FakeKeptWorld, static_page
from tests.e2e.served import running
from tests.preloaded import PreloadedProcess

HOME = "http://127.0.0.1:30000"
TOKEN = "t" * 43

WATCH_STATES = """() => {
    globalThis.states = [];
    new MutationObserver(() => globalThis.states.push(document.body.dataset.state)).observe(document.body, {
        attributeFilter: ["data-state"],
    });
}"""
"""Notes every state of the session from now on."""


@pytest.fixture(scope="module")
def static_url():
    with static_page() as url:
        yield url


@pytest.fixture
def world(visitor, static_url):
    """The page is open and can be started."""
    FakeApi(visitor.page, HOME)
    world = FakeKeptWorld(visitor.page, HOME)
    visitor.open(static_url)
    return world


def saved_world(**init: object) -> bytes:
    """A file of the kind that ``save`` gives, with a first frame of one colour."""
    about = {"session_id": "x", "init": {"type": "init", "prompt": "A harbour.", "size": "160x96", "seed": 9} | init}
    frame = bytes([200, 30, 30]) * (160 * 96)
    header = {
        "__metadata__": {"format": "lingbot_rt world 1", "world": "{}", "about": json.dumps(about)},
        "first_frame": {"dtype": "U8", "shape": [96, 160, 3], "data_offsets": [0, len(frame)]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + frame


def walk(visitor, world: FakeKeptWorld, chunks: int) -> None:
    """More chunks of the walk, each shown before the next."""
    for _ in range(chunks):
        before = int(visitor.page.get_attribute("#walk-at", "max") or 0)
        world.chunk()
        visitor.page.wait_for_function(f"() => Number(document.getElementById('walk-at').max) > {before}")


def asked(world: FakeKeptWorld, kind: str) -> list[dict]:
    return [event["payload"] for event in world.events if event["kind"] == kind]


def test_a_lost_line_comes_back(visitor, world):
    """A card lies over the last picture. The session goes on where it was, with the keys that are held by then."""
    page = visitor.page
    visitor.start()
    page.keyboard.down("w")
    page.wait_for_function("() => document.getElementById('latency-text').textContent")
    world.answers = False
    picture = visitor.wait_for_stillness()
    world.lose_line()
    page.wait_for_selector("#away:visible")
    assert page.inner_text("#away h2") == "Back in a moment"
    assert page.inner_text("#status") == "Back in a moment"
    assert visitor.pixels() == picture
    assert page.locator(".card").count() == 0
    page.keyboard.up("w")
    before = len(world.events)
    world.answers = True
    visitor.wait_until(lambda: len(world.inits) >= 2, "the page does not come back")
    world.open_session()
    visitor.wait_for_state("live")
    assert page.is_hidden("#away")
    visitor.wait_until(lambda: len(world.events) > before, "the released key was not sent")
    assert world.events[-1]["payload"]["transitions"][-1]["actions"] == []
    first, again = world.inits[0], world.inits[-1]
    assert "resume" not in first
    assert (again["resume"], again["received_chunk"], again["received_frames"]) == (TOKEN, 1, 4)


def test_a_world_that_the_server_no_longer_has(visitor, world):
    """A refused token and a session taken elsewhere are cards of their own; the page can start anew."""
    page = visitor.page
    visitor.start()
    world.has_world = False
    world.lose_line()
    card = page.wait_for_selector("[data-key=session]").inner_text()
    assert "no longer has this world" in card
    assert "no session has this token" in card
    visitor.wait_for_state("lost")
    page.click("[data-key=session] .button.accent")
    visitor.wait_for_state("live")
    assert "resume" not in world.inits[-1]
    inits = len(world.inits)
    world.send({"type": "error", "code": "resumed_elsewhere", "content": "another connection has the session"})
    world.close(1008, "resumed elsewhere")
    assert "another window" in page.wait_for_selector("[data-key=session]").inner_text()
    assert len(world.inits) == inits


def test_a_visitor_need_not_wait(visitor, world):
    """The card's button ends the session; a reload then begins with the start button."""
    page = visitor.page
    visitor.start()
    world.answers = False
    world.lose_line()
    page.click("#leave-away")
    visitor.wait_for_state("ended")
    assert page.locator(".card").count() == 0
    page.reload()
    page.wait_for_selector("#start:enabled")
    assert page.get_attribute("body", "data-state") == "idle"


def test_a_reload_goes_on(visitor, world):
    """With the token, by itself, and with the last picture until the first new one."""
    page = visitor.page
    visitor.start()
    picture = visitor.wait_for_stillness()
    world.answers = False
    page.reload()
    visitor.wait_for_state("away")
    page.wait_for_function("() => document.getElementById('canvas').width > 100")
    shown = visitor.pixels()
    assert max(abs(one - other) for one, other in zip(shown, picture, strict=True)) < 40, "not the last picture"
    visitor.wait_until(lambda: len(world.inits) >= 2, "the page does not come back")
    assert world.inits[-1]["resume"] == TOKEN
    assert "received_chunk" not in world.inits[-1]
    world.open_session()
    visitor.wait_for_state("live")
    page.keyboard.press("w")
    visitor.wait_until(lambda: asked(world, "camera_actions") != [], "the key was not sent")
    page.click("#stop")
    visitor.wait_for_state("ended")


def test_go_back_to_here(visitor, world):
    """The walk is scrubbed with the keyboard. What came after stays a walk of its own, from whose end one goes on."""
    page = visitor.page
    visitor.start()
    assert page.is_hidden("#walk")
    world.chunk()
    page.wait_for_selector("#walk:visible")
    walk(visitor, world, 4)
    page.fill("#prompt", "rain")
    page.click("#apply-prompt")
    page.wait_for_selector("#timeline li:nth-child(2):not(.waiting)")
    assert page.is_hidden("#walk-go")
    page.focus("#walk-at")
    assert page.get_attribute("#walk-at", "aria-valuetext") == "Now"
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#walk-preview:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#walk-preview", state="hidden")
    page.focus("#walk-at")
    page.keyboard.press("Home")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert page.get_attribute("#walk-at", "aria-valuetext") == "0:01"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#walk-lines button:nth-child(2)[aria-pressed=true]")
    assert asked(world, "branch") == [{"chunk": 2, "branch": 0}]
    assert page.inner_text("#walk-lines") == "Walk 1\nWalk 2, now"
    assert page.evaluate("() => document.activeElement.id") == "stage", "the keyboard is back with the world"
    page.wait_for_selector("#apply-prompt:visible")  # the first prompt is in force again
    page.click("#walk-lines button:nth-child(1)")
    page.wait_for_selector("#walk-go:visible")
    page.click("#walk-go")
    page.wait_for_selector("#walk-lines button:nth-child(1)[aria-pressed=true]:has-text('now')")
    assert asked(world, "rewind") == [{"chunk": 7, "branch": 0}]
    assert page.is_hidden("#apply-prompt")


def test_the_help_names_the_walk_strip(visitor, world):
    """With the words that its buttons have."""
    page = visitor.page
    visitor.start()
    walk(visitor, world, 3)
    page.click("#open-help")
    told = page.inner_text("#help-body")
    for name in (page.get_attribute("#walk", "aria-label"), *map(page.text_content, ("#walk-go", "#walk-cancel"))):
        assert name.strip() in told


def test_a_refused_way_back(visitor, world):
    """A card says why, and the place can be tried again."""
    page = visitor.page
    visitor.start()
    walk(visitor, world, 3)
    world.refusal = "invalid event: chunk: 0 is not kept, expected a chunk of branch 0 that is: 2 to 3"
    page.focus("#walk-at")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert "0 is not kept" in page.wait_for_selector("[data-key=refused]").inner_text()
    world.refusal = None
    page.wait_for_selector("#walk-go:enabled")
    page.click("#walk-go")
    page.wait_for_selector("#walk-lines:visible")


def test_a_world_is_saved_and_opened(visitor, world, tmp_path):
    """The file downloads. Opened, it brings its prompt, seed and first frame. Another file is refused by a card."""
    page = visitor.page
    world.world = saved_world()
    page.click("#export summary")
    assert page.locator("#save-world").is_disabled()
    visitor.start()
    page.wait_for_selector("#save-world:enabled")
    with page.expect_download() as saved:
        page.click("#save-world")
    assert saved.value.suggested_filename.endswith(".safetensors")
    file = tmp_path / "world.safetensors"
    saved.value.save_as(file)
    assert file.read_bytes() == world.world
    page.set_input_files("#open-world", file)
    visitor.wait_until(lambda: len(world.inits) == 2, "the world was not sent")
    visitor.wait_for_state("live")
    init = world.inits[-1]
    assert init["resume"] == world.world
    assert "first_frame" not in init
    assert "seed" not in init
    assert page.input_value("#prompt") == "A harbour."
    assert page.input_value("#seed") == "9"
    red = "() => [...document.getElementById('first-preview').getContext('2d').getImageData(9, 9, 1, 1).data]"
    assert page.evaluate(red) == [200, 30, 30, 255]
    assert page.locator("#save-session").is_disabled()
    page.set_input_files("#open-world", {"name": "x.safetensors", "mimeType": "", "buffer": b"no world"})
    assert "no saved world" in page.wait_for_selector("[data-key=world]").inner_text()


@pytest.fixture
def parking_server(chromium, tmp_path):
    """A server that keeps its sessions on disk when it stops."""
    with running(tmp_path, *parking_flags(tmp_path)) as it:
        yield it


def parking_flags(folder: Path) -> list[str]:
    """The page tries for as long as a loaded machine may need to restart the server."""
    return [*BUILTIN, "--park-dir", str(folder / "parked"), "--resume-s", "600"]


def test_a_walk_outlives_the_line_and_the_server(visitor, parking_server):
    """The line is cut, then the server restarts: the page goes on by itself, and back to what was before both."""
    page, server = visitor.page, parking_server
    visitor.expected = ("net::ERR_", "WebSocket connection")  # the browser reports every request that failed

    def walks_on() -> None:
        """One more chunk at least, and frames that a key steers."""
        end = int(page.get_attribute("#walk-at", "max"))
        page.evaluate("() => (document.getElementById('latency-text').textContent = '')")
        page.keyboard.press("w")
        page.wait_for_function("() => document.getElementById('latency-text').textContent")
        page.wait_for_function(f"() => Number(document.getElementById('walk-at').max) >= {end + 1}")

    with CutLine(server.port) as line:
        visitor.open(line.url)
        visitor.start()
        page.wait_for_selector("#walk:visible")
        walks_on()

        page.evaluate(WATCH_STATES)
        line.cut()
        page.wait_for_function("() => globalThis.states.includes('away') && globalThis.states.at(-1) === 'live'")
        walks_on()

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        visitor.wait_for_state("away")
        before = int(page.get_attribute("#walk-at", "max"))
        flags = ["--port", str(server.port), *parking_flags(server.log.parent)]
        command = [sys.executable, "-m", "lingbot_rt", "serve", *flags]
        server.process = PreloadedProcess(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, log=server.log)
        visitor.wait_for_state("live")
        assert int(page.get_attribute("#walk-at", "max")) >= before
        walks_on()
        assert page.locator(".card").count() == 0

        page.focus("#walk-at")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        page.wait_for_selector("#walk-lines button:nth-child(2)[aria-pressed=true]")
        walks_on()
        page.click("#export summary")
        before = int(page.get_attribute("#walk-at", "max"))
        with page.expect_download() as saved:
            page.click("#save-world")
        after = int(page.get_attribute("#walk-at", "max"))
        assert before <= read_world(Path(saved.value.path()).read_bytes()).chunk_index <= after + 2
        page.click("#stop")
        visitor.wait_for_state("ended")
