"""What a user does on the page, from the start to a saved clip."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from tests.browser.conftest import BUILTIN
from tests.browser.sites import WEBUI, path_proxy, static_page

PAGE_LIMIT_BYTES = 400_000
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}

DROP = """(bytes) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "windmill.webp", { type: "image/webp" }));
    dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
}"""
"""Drops an image file on the page."""

GAMEPAD = """(axes) => {
    navigator.getGamepads = () => [{ index: 0, axes, buttons: [] }];
    dispatchEvent(new Event("gamepadconnected"));
}"""
"""A gamepad with its sticks at ``axes``: left x and y, right x and y."""


def read_all(socket: ClientConnection) -> None:
    """Reads until the connection is closed: the server closes clients that do not read."""
    with suppress(ConnectionClosed):
        while True:
            socket.recv()


def test_one_click_starts_a_session_and_keys_steer_it(visitor, server):
    """The video moves after one click. A held key is shown. Its latency is shown to those who open the meters."""
    page = visitor.page
    visitor.open(server.http)
    visitor.start()
    visitor.wait_for_change(visitor.pixels())
    page.keyboard.down("w")
    page.wait_for_selector(".pad.held[data-action=w][aria-pressed=true]")
    page.wait_for_selector("#latency-text:has-text('ms')", state="attached")
    assert page.locator("#latency-pill").is_hidden()
    page.click("#toggle-meters")
    assert re.fullmatch(r"Key to frame \d+ ms", page.inner_text("#latency-text"))
    page.keyboard.down("ArrowLeft")
    page.wait_for_selector(".pad.held[data-action=j]")
    page.keyboard.up("ArrowLeft")
    page.keyboard.up("w")
    assert page.locator(".pad.held").count() == 0
    visitor.wait_for_change(visitor.pixels())


def test_start_waits_for_a_first_frame_that_is_still_loading(visitor, server):
    """Start is enabled as soon as the model is ready. The session starts once the first frame has loaded."""
    page = visitor.page
    held_back, gate_is_open = [], threading.Event()
    page.route("**/presets/*.webp", lambda it: it.continue_() if gate_is_open.is_set() else held_back.append(it))
    visitor.open(server.http)
    page.click("#start")
    page.wait_for_selector("#start:disabled:has-text('Loading the image')")
    gate_is_open.set()
    for request in held_back:
        request.continue_()
    visitor.wait_for_state("live")
    assert page.locator(".card").count() == 0


def test_nothing_stays_held_when_the_page_loses_the_keyboard(visitor, server):
    """Blur and a focused text field release the keys. A key typed into a field does not walk."""
    page = visitor.page
    visitor.open(server.http)
    visitor.start()
    page.keyboard.down("w")
    page.wait_for_selector(".pad.held")
    page.evaluate("() => dispatchEvent(new Event('blur'))")
    assert page.locator(".pad.held").count() == 0
    page.keyboard.up("w")
    page.keyboard.down("d")
    page.wait_for_selector(".pad.held[data-action=d]")
    page.focus("#prompt")
    assert page.locator(".pad.held").count() == 0
    page.keyboard.up("d")
    page.keyboard.press("w")
    assert page.locator(".pad.held").count() == 0


def test_a_new_prompt_takes_effect_and_the_timeline_says_when(visitor, server):
    """A new prompt gets the time of the first drawn frame that carries it."""
    page = visitor.page
    visitor.open(server.http)
    visitor.start()
    page.fill("#prompt", "The same valley under deep snow.")
    page.click("#apply-prompt")
    page.wait_for_selector("#timeline li:nth-child(2):not(.waiting)")
    assert re.match(r"\d+:\d\d", page.inner_text("#timeline li:nth-child(2) time"))
    assert page.locator("#apply-prompt").is_hidden()


def test_keys_can_be_changed_and_a_gamepad_walks(visitor, server):
    """A key chosen in the help walks and is remembered. A gamepad's sticks hold their directions."""
    page = visitor.page
    visitor.open(server.http)
    page.keyboard.press("?")
    page.click("[aria-label='Walk forward: add a key']")
    page.keyboard.press("z")
    page.wait_for_selector("[aria-label='Walk forward: Z, change']")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("#start:enabled")
    visitor.start()
    page.keyboard.down("z")
    page.wait_for_selector(".pad.held[data-action=w]")
    page.keyboard.up("z")
    assert page.locator(".pad.held").count() == 0
    page.evaluate(GAMEPAD, [0, -1, 1, 0])
    page.wait_for_selector(".pad.held[data-action=w]")
    page.wait_for_selector(".pad.held[data-action=l]")
    page.evaluate(GAMEPAD, [0, 0, 0, 0])
    page.wait_for_selector(".pad.held", state="detached")


def test_all_four_formats_show_the_video(visitor, server):
    """WebP, JPEG, raw and delta-gzip each show a moving video, and the choice is remembered."""
    page = visitor.page
    visitor.open(server.http)
    page.click("#advanced summary")
    for name in ("webp", "jpeg", "raw", "delta-gzip"):
        page.select_option("#set-realtime_output_format", name)
        assert page.locator("#set-output_compression").is_visible() == (name in ("webp", "jpeg"))
        visitor.start()
        page.keyboard.down("w")
        page.wait_for_function("() => document.getElementById('latency-text').textContent")
        page.keyboard.up("w")
        picture = visitor.wait_for_change(visitor.pixels())
        colors = [value for i, value in enumerate(picture) if i % 4 != 3]
        assert max(colors) - min(colors) > 20, f"{name}: an empty frame"
        page.evaluate("() => (document.getElementById('latency-text').textContent = '')")
        page.click("#stop")
        visitor.wait_for_state("ended")
    assert page.locator(".card").count() == 0
    page.reload()
    page.wait_for_selector("#start:enabled")
    assert page.input_value("#set-realtime_output_format") == "delta-gzip"


def test_pause_resume_and_restart(visitor, server):
    """Nothing is drawn while paused, and no stall is shown. A restart uses the prompt and seed shown on the page."""
    page = visitor.page
    visitor.open(server.http)
    visitor.start()
    page.keyboard.press("Space")
    visitor.wait_for_state("paused")
    still = visitor.wait_for_stillness()
    assert page.locator("#stall").is_hidden()
    page.click("#start")
    visitor.wait_for_state("live")
    visitor.wait_for_change(still)
    page.fill("#seed", "7")
    visitor.restart_by(lambda: page.click("#restart"))
    assert page.locator("#timeline li").count() == 1
    page.click("#export summary")
    with page.expect_download() as saved:
        page.click("#save-session")
    init = json.loads(Path(saved.value.path()).read_text())["init"]
    assert init["seed"] == 7
    assert init["prompt"] == page.input_value("#prompt")


def test_clip_screenshot_and_session_are_saved(visitor, server, tmp_path):
    """A clip plays in the gallery and downloads. The saved session has every key event, with its chunk, and replays."""
    page = visitor.page
    visitor.open(server.http)
    visitor.start()
    page.click("#record")
    page.wait_for_selector("#rec-pill:visible")
    page.keyboard.down("w")
    page.wait_for_function("() => document.getElementById('latency-text').textContent")
    page.keyboard.up("w")
    page.wait_for_function("() => document.getElementById('rec-text').textContent >= '0:01'")
    page.click("#record")
    page.wait_for_selector("#open-gallery:enabled")
    page.click("#screenshot")
    page.click("#export summary")
    with page.expect_download() as saved:
        page.click("#save-session")
    session = tmp_path / "session.json"
    saved.value.save_as(session)
    events = json.loads(session.read_text())["events"]
    assert [event["payload"]["transitions"][-1]["actions"] for event in events] == [["w"], []]
    assert all(event["chunk_index"] is not None for event in events[:1])

    page.wait_for_function("() => document.getElementById('clip-count').textContent === '2'")
    page.click("#open-gallery")
    with page.expect_download() as clip:
        page.click("[aria-label^='Download'][aria-label$='.mp4'], [aria-label^='Download'][aria-label$='.webm']")
    data = Path(clip.value.path()).read_bytes()
    assert data[4:8] == b"ftyp" or data[:4] == b"\x1a\x45\xdf\xa3"
    page.wait_for_function("() => document.querySelector('#gallery video').readyState >= 1")
    length = page.evaluate("() => document.querySelector('#gallery video').duration")
    assert length > 1
    page.keyboard.press("Escape")

    visitor.restart_by(lambda: page.set_input_files("#load-session", session))
    assert page.locator(".card").count() == 0


def test_a_second_visitor_waits_in_line(make_visitor, server):
    """The page shows the place and the time, the visitor may leave, and enters when the first visitor stops."""
    first, second = make_visitor(), make_visitor()
    first.open(server.http)
    first.start()
    page = second.page
    second.open(server.http)
    page.wait_for_selector("#server-chip[data-tone=used]")
    page.wait_for_selector("#start-note:has-text('You will wait in line')")
    page.click("#start")
    page.wait_for_selector("#line:visible")
    assert page.inner_text("#line-place") == "You are next"
    page.wait_for_function("() => document.getElementById('line-time').textContent >= '0:01'")
    assert page.is_hidden("#start")
    assert page.locator(".card").count() == 0
    page.click("#leave-line")
    page.wait_for_selector("#start:visible")
    assert page.get_attribute("body", "data-state") == "idle"
    page.click("#start")
    page.wait_for_selector("#line:visible")
    first.page.click("#stop")
    second.wait_for_state("live")
    assert page.is_hidden("#line")
    assert page.locator(".card").count() == 0


def test_missing_prompts_and_bad_images_are_reported(visitor, server):
    """An empty prompt and a file that is not an image are reported before anything is sent. A dropped image is used."""
    page = visitor.page
    visitor.open(server.http)
    page.wait_for_selector("[data-preset][aria-pressed=true]")
    page.fill("#prompt", "  ")
    page.click("#start")
    assert "A prompt is needed" in page.inner_text("[data-key=session]")
    page.click("[data-key=session] .close")
    assert page.locator(".card").count() == 0
    page.set_input_files("#first-file", {"name": "note.png", "mimeType": "image/png", "buffer": b"not a picture"})
    page.wait_for_selector("[data-key=image]")
    page.click("[data-key=image] .close")
    page.evaluate(DROP, list((WEBUI / "presets" / "windmill.webp").read_bytes()))
    page.wait_for_selector("[data-preset][aria-pressed=true]", state="detached")
    assert page.locator(".card").count() == 0


def test_a_preset_chosen_during_a_session_asks_first(visitor, server):
    """The dialog's buttons send only the preset's prompt, or start a new session from it."""
    page = visitor.page
    visitor.open(server.http)
    visitor.start()
    page.click("[data-preset=night]")
    page.click("#preset-dialog button[value=prompt]")
    page.wait_for_selector("#timeline li:nth-child(2):not(.waiting)")
    page.click("[data-preset=windmill]")
    visitor.restart_by(lambda: page.click("#preset-dialog button[value=restart]"))
    assert page.get_attribute("[data-preset=windmill]", "aria-pressed") == "true"
    assert page.locator("#timeline li").count() == 1
    assert "blue cap" in page.inner_text("#timeline")


def test_a_phone_has_sticks_and_a_settings_sheet(make_visitor, server):
    """The video is as wide as the screen. A stick holds its direction until released. The sheet opens and closes."""
    visitor = make_visitor(**PHONE)
    page = visitor.page
    visitor.open(server.http)
    assert page.locator("#frame").bounding_box()["width"] == pytest.approx(390, abs=1)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert page.locator("#prompt").is_visible()
    visitor.start()
    page.click("#open-sheet")
    page.wait_for_selector("#close-sheet:visible")
    page.click("#close-sheet")
    page.wait_for_selector("#close-sheet", state="hidden")
    stick = page.locator("#stick-move").bounding_box()
    x, y = stick["x"] + stick["width"] / 2, stick["y"] + stick["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 50)
    page.wait_for_selector(".pad.held[data-action=w]", state="attached")
    page.mouse.up()
    assert page.locator(".pad.held").count() == 0


def test_the_page_is_small_and_loads_only_from_its_server(visitor, server):
    """All requests go to the server. Without the preset images the page has less than 400 KB."""
    page = visitor.page
    sizes: dict[str, int] = {}
    page.on("response", lambda answer: sizes.update({answer.url: int(answer.headers.get("content-length", 0))}))
    visitor.open(server.http)
    page.click("#toggle-meters")
    page.wait_for_selector(".uplot", state="attached")
    visitor.start()
    hosts = {url.split("/")[2] for url in visitor.requests if not url.startswith(("blob:", "data:"))}
    assert hosts == {server.http.removeprefix("http://")}
    page_bytes = sum(size for url, size in sizes.items() if "/presets/" not in url and "/v1/" not in url)
    assert 100_000 < page_bytes < PAGE_LIMIT_BYTES


def test_any_static_server_can_serve_the_page(visitor, server):
    """The page works from another origin, with ?server= naming the server."""
    with static_page() as url:
        visitor.open(f"{url}?server=127.0.0.1:{server.port}")
        visitor.start()
        visitor.wait_for_change(visitor.pixels())
        visitor.page.click("#stop")


def test_the_page_plays_behind_a_proxy_below_a_path(visitor, server):
    """Every address is below the path. Nothing is asked at the root."""
    with path_proxy(server.port, "/user/me/world/") as url:
        visitor.open(url)
        visitor.start()
        visitor.wait_for_change(visitor.pixels())
        visitor.page.click("#stop")
        visitor.wait_for_state("ended")
        paths = ["/" + address.split("/", 3)[3] for address in visitor.requests if not address.startswith("blob:")]
        assert [path for path in paths if not path.startswith("/user/me/world/")] == []


def test_a_proxy_that_does_not_pass_upgrade_is_named(visitor, server):
    """The card says that the WebSocket is blocked, not that the server may be down. The page stays usable."""
    visitor.expected = ("WebSocket connection",)
    with path_proxy(server.port, "/world/", passes_upgrade=False) as url:
        visitor.open(url)
        visitor.page.click("#start")
        card = visitor.page.wait_for_selector("[data-key=session]").inner_text()
        assert "WebSocket is blocked" in card
        assert "server runs" not in card
        assert visitor.page.locator("#start").is_enabled()


def test_the_page_survives_a_server_restart(visitor, server):
    """The page finds the server again, which has lost the world, and keeps the prompt.

    The last test, since it ends the server.
    """
    page = visitor.page
    visitor.open(server.http)
    visitor.expected = ("net::ERR_", "WebSocket connection")  # the browser reports every request that failed
    page.fill("#prompt", "A harbour in the fog.")
    visitor.start()
    server.process.kill()
    server.process.wait()
    visitor.wait_for_state("away")
    page.wait_for_selector("#server-chip[data-tone=bad]")

    flags = [sys.executable, "-m", "lingbot_rt", "serve", "--port", str(server.port), *BUILTIN]
    with server.log.open("ab") as output, subprocess.Popen(flags, stdout=output, stderr=output) as again:
        try:
            while not page.locator("#server-chip[data-tone=good]").is_visible():
                assert again.poll() is None, server.log.read_text()
                page.wait_for_timeout(100)
            visitor.wait_for_state("lost")
            assert page.input_value("#prompt") == "A harbour in the fog."
            visitor.start()
            assert page.locator(".card").all_inner_texts() == []
        finally:
            again.terminate()
