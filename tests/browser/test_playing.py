"""Starting, steering and leaving a world, with a made-up server that answers every event with frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser.sites import FakeApi, FakeWorld, static_page

HOME = "http://127.0.0.1:30000"


@pytest.fixture(scope="module")
def static_url():
    with static_page() as url:
        yield url


@pytest.fixture
def api(visitor):
    return FakeApi(visitor.page, HOME)


@pytest.fixture
def world(visitor, api, static_url):
    """The page is open and can be started."""
    world = FakeWorld(visitor.page, HOME)
    visitor.open(static_url)
    return world


def actions_sent(world: FakeWorld) -> list[list[str]]:
    return [
        transition["actions"]
        for event in world.events
        if event["kind"] == "camera_actions"
        for transition in event["payload"]["transitions"]
    ]


def wait_for_action(visitor, world: FakeWorld, action: str) -> None:
    visitor.wait_until(lambda: [action] in actions_sent(world), f"{action} was not sent")


def test_keys_start_the_world_and_are_shown(visitor, world):
    """Enter, Space and the key that walks start it. A key held since the start walks. One pressed later starts none."""
    page = visitor.page
    shown = page.locator("#start-keys kbd").all_inner_texts()
    assert {"W", "A", "S", "D", "I", "J", "K", "L", "Space", "Enter"} <= set(shown)
    page.keyboard.down("w")
    visitor.wait_for_state("live")
    wait_for_action(visitor, world, "w")
    page.keyboard.up("w")
    assert page.locator("#start-keys").is_hidden()
    for key in ("Enter", "Space"):
        page.click("#stop")
        visitor.wait_for_state("ended")
        page.keyboard.press("w")
        assert page.locator("body[data-state=ended]").count() == 1
        page.keyboard.press(key)
        visitor.wait_for_state("live")
    page.click("#stop")
    visitor.wait_for_state("ended")
    page.focus("#toggle-meters")
    page.keyboard.press("Enter")
    assert page.get_attribute("#toggle-meters", "aria-pressed") == "true", "a focused button keeps its key"
    assert len(world.inits) == 3


def test_the_limits_of_the_builtin_model_are_announced(visitor, api, static_url):
    """The stage says before the start what the built-in model knows. It says it of no other model."""
    page, note = visitor.page, visitor.page.locator("#start-note")
    visitor.open(static_url)
    assert note.inner_text() == ""
    api.model["id"] = "lingbot-rt-builtin"
    FakeWorld(page, HOME)
    visitor.open(static_url)
    page.wait_for_selector("#start-note:has-text('one small village')")
    page.click("#advanced summary")
    page.select_option("#set-size", "832x480")
    page.wait_for_selector("#start-note:has-text('a blur')")
    page.select_option("#set-size", "160x96")
    visitor.start()
    page.keyboard.press("Space")
    visitor.wait_for_state("paused")
    assert "village" not in note.inner_text()


def test_the_keyboard_goes_back_to_the_world(visitor, world):
    """After words were sent, after Escape and after a click, keys steer and Space pauses."""
    page = visitor.page
    visitor.start()
    page.fill("#prompt", "rain")
    page.press("#prompt", "Control+Enter")
    page.keyboard.press("w")
    wait_for_action(visitor, world, "w")
    assert page.input_value("#prompt") == "rain"
    page.focus("#prompt")
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    wait_for_action(visitor, world, "d")
    assert page.input_value("#prompt") == "rain"
    for button in ("#toggle-meters", "#dice", "#screenshot", "#export summary"):
        page.click(button)
        page.keyboard.press("Space")
        visitor.wait_for_state("paused")
        page.keyboard.press("Space")
        visitor.wait_for_state("live")
    page.click("#server-chip")
    page.keyboard.press("Escape")
    page.wait_for_selector("#server-dialog", state="hidden")
    page.keyboard.press("Space")
    visitor.wait_for_state("paused")


def test_settings_changed_during_a_session_say_that_they_wait(visitor, world):
    """The size and seed of the running session stay. The notes go when the next one starts with the new values."""
    page = visitor.page
    visitor.start()
    assert page.locator(".later:visible").count() == 0
    shape = page.evaluate("() => document.documentElement.style.getPropertyValue('--aspect')")
    page.click("#advanced summary")
    page.select_option("#set-size", "832x480")
    page.fill("#seed", "7")
    page.press("#seed", "Enter")
    page.wait_for_selector("#seed-note:visible")
    assert page.locator(".later:visible").count() == 2
    assert page.evaluate("() => document.documentElement.style.getPropertyValue('--aspect')") == shape
    page.click("#restart")
    visitor.wait_until(lambda: len(world.inits) == 2, "no second session")
    visitor.wait_for_state("live")
    assert (world.inits[1]["size"], world.inits[1]["seed"]) == ("832x480", 7)
    assert page.locator(".later:visible").count() == 0


def test_a_size_that_plays_slowly_says_so_before_the_start(visitor, world):
    """On a CPU a large size is said to be slow. After it was played, the measured rate is shown."""
    page = visitor.page
    assert page.inner_text("#start-note") == ""
    page.click("#advanced summary")
    page.select_option("#set-size", "832x480")
    page.wait_for_selector("#start-note:has-text('CPU')")
    world.chunk_ms = 4000.0
    visitor.start()
    world.chunk()
    page.keyboard.press("w")
    page.wait_for_function("() => JSON.parse(localStorage['lingbot-rt.settings']).rates")
    page.click("#stop")
    page.wait_for_selector("#start-note:has-text('played at 1.0 frames/s')")


def test_a_size_that_compiles_first_says_so(visitor, api, world):
    """Before the start and while the server compiles the page says what it waits for. The session can be left."""
    page, note = visitor.page, visitor.page.locator("#start-note")
    api.model["warm_sizes"] = ["160x96"]
    visitor.open(page.url)
    page.wait_for_selector("#server-chip[data-tone=good]")
    assert "prepares" not in note.inner_text()
    page.click("#advanced summary")
    page.select_option("#set-size", "832x480")
    page.wait_for_selector("#start-note:has-text('first prepares 832 × 480')")
    world.compiles = True
    page.click("#start")
    page.wait_for_selector("#start-note:has-text('The last size took 42 s')")
    assert page.inner_text("#start") == "Preparing this size"
    assert page.get_attribute("body", "data-state") == "connecting"
    page.click("#stop")
    visitor.wait_for_state("ended")
    page.click("#start")
    page.wait_for_selector("#start-note:has-text('The last size took 42 s')")
    world.open_session()
    visitor.wait_for_state("live")
    assert "prepares" not in note.inner_text()


def test_the_page_asks_before_it_loses_a_clip(visitor, world):
    """A screenshot that was not downloaded makes the browser ask. One that was does not."""
    page = visitor.page
    visitor.start()
    page.click("#screenshot")
    page.wait_for_selector("#open-gallery:enabled")
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    page.close(run_before_unload=True)
    visitor.wait_until(lambda: asked == ["beforeunload"], "the page did not ask")
    page.click("#open-gallery")
    with page.expect_download():
        page.click("[aria-label^='Download']")
    with page.expect_event("close"):
        page.close(run_before_unload=True)
    assert len(asked) == 1


def test_after_a_reload_ones_own_old_session_is_nobody_else(visitor, api, world, static_url):
    """While it ends the server says that it is busy. Somebody else's session is told."""
    page = visitor.page
    visitor.start()
    api.model["busy"] = True
    seen = len(api.asked)
    visitor.open(static_url)
    visitor.wait_until(lambda: len(api.asked) > seen, "not asked")
    assert page.inner_text("#start-note") == ""
    assert "In use" not in page.inner_text("#server-chip")
    api.model["busy"] = False
    seen = len(api.asked)
    visitor.wait_until(lambda: len(api.asked) > seen + 1, "not asked again")
    api.model["busy"] = True
    page.wait_for_selector("#server-chip:has-text('In use')")


def test_values_out_of_range_are_refused_and_not_changed(visitor, world):
    """What was typed stays, with what is expected. The session gets the value from before."""
    page = visitor.page
    page.click("#advanced summary")
    for field, typed in (("#set-fps", "900"), ("#set-num_inference_steps", "1.5"), ("#seed", "-3")):
        page.fill(field, typed)
        page.press(field, "Enter")
        assert page.input_value(field) == typed
        assert page.get_attribute(field, "aria-invalid") == "true"
    assert page.locator(".problem:visible").count() == 3
    page.select_option("#set-realtime_output_format", "raw")
    assert page.input_value("#set-fps") == "900", "another change does not hide it"
    page.fill("#prompt", "x" * 9000)
    assert len(page.input_value("#prompt")) == 9000
    page.click("#start")
    assert "9000" in page.inner_text("#prompt-problem")
    assert world.inits == []
    page.fill("#prompt", "A lake.")
    visitor.start()
    init = world.inits[0]
    assert (init["fps"], init["num_inference_steps"], init["seed"], init["prompt"]) == (16, 4, 42, "A lake.")
    page.fill("#set-fps", "24")
    page.press("#set-fps", "Enter")
    assert page.locator(".field:has(#set-fps) .problem").is_hidden()


def test_another_server_chosen_during_a_session_leaves_the_session_alone(visitor, world):
    """It goes on, its chunks count for its own server, and its end asks about the chosen one."""
    page = visitor.page
    visitor.expected = ("net::ERR_",)
    FakeApi(page, "http://box.example:1").is_up = False
    visitor.start()
    page.click("#server-chip")
    page.fill("#server-address", "box.example:1")
    page.press("#server-address", "Enter")
    page.wait_for_selector("#server-chip[data-tone=bad]")
    page.keyboard.press("w")
    page.wait_for_function("() => JSON.parse(localStorage['lingbot-rt.settings']).rates")
    (played,) = page.evaluate("() => Object.keys(JSON.parse(localStorage['lingbot-rt.settings']).rates)")
    assert HOME in played
    page.click("#stop")
    page.wait_for_selector("#connect:visible")


def test_a_d_pad_walks(visitor, world):
    """The buttons of a gamepad's d-pad hold their directions. Screen readers hear which on-screen keys are held."""
    page = visitor.page
    visitor.start()
    assert page.locator(".pad[aria-pressed=false]").count() == 8
    page.evaluate(
        """() => {
            const buttons = Array.from({ length: 17 }, (_, i) => ({ pressed: i === 13 || i === 15 }));
            navigator.getGamepads = () => [{ index: 0, axes: [0, 0, 0, 0], buttons }];
            dispatchEvent(new Event("gamepadconnected"));
        }"""
    )
    page.wait_for_selector(".pad[data-action=s][aria-pressed=true]")
    visitor.wait_until(lambda: ["s", "d"] in actions_sent(world), "the d-pad does not walk")


def test_a_replay_says_so_and_ends(visitor, world, tmp_path):
    """It plays the chunks of the saved session, ignores the keyboard, and says that it is over."""
    page = visitor.page
    visitor.start()
    page.keyboard.press("w")
    wait_for_action(visitor, world, "w")
    visitor.wait_until(lambda: [] in actions_sent(world), "the release was not sent")
    page.click("#export summary")
    with page.expect_download() as saved:
        page.click("#save-session")
    file = Path(saved.value.path())
    log = json.loads(file.read_text())
    log["chunks"] = 9
    (tmp_path / "session.json").write_text(json.dumps(log))
    before = len(world.events)
    page.set_input_files("#load-session", tmp_path / "session.json")
    page.wait_for_selector("#state-pill:has-text('Replay')")
    visitor.wait_until(lambda: len(world.events) == before + 2, "the events were not replayed")
    assert world.inits[1]["max_chunks"] == 9
    page.keyboard.press("d")
    while page.evaluate("() => document.body.dataset.state") == "live":
        world.chunk()
        page.wait_for_timeout(20)
    visitor.wait_for_state("ended")
    assert page.inner_text("#state-text") == "The replay is over"
    assert len(world.events) == before + 2


def test_who_leaves_the_line_still_hears_that_somebody_else_is_inside(visitor, api, world):
    """Only a session that the server really ran excuses its being busy for a while."""
    page = visitor.page
    world.place_in_line = 1
    api.model["busy"] = True
    page.click("#start")
    page.wait_for_selector("#line:visible")
    page.click("#leave-line")
    page.wait_for_selector("#start:visible")
    page.wait_for_selector("#start-note:has-text('in use')")
    seen = len(api.asked)
    visitor.wait_until(lambda: len(api.asked) > seen + 1, "not asked again")
    assert "in use" in page.inner_text("#start-note")
