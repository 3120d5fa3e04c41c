"""The picture is the largest thing on the page at every size, and everything else has a place beside or below it."""

from __future__ import annotations

import pytest

from tests.browser.conftest import LIMIT_MS
from tests.browser.sites import FakeApi, static_page

SIZES = {
    # name: width, height, whether the screen is touched, least share of the window for the picture (before, during)
    "desktop": (1440, 900, False, 0.5, 0.5),
    "large desktop": (1920, 1080, False, 0.65, 0.65),
    "small laptop": (1280, 640, False, 0.4, 0.4),
    "landscape": (1024, 768, False, 0.6, 0.7),
    "tablet on its side": (1024, 768, True, 0.6, 0.65),
    "portrait": (768, 1024, False, 0.4, 0.4),
    "tablet": (768, 1024, True, 0.4, 0.4),
    "phone on its side": (844, 390, True, 0.65, 0.6),
    "small phone on its side": (667, 375, True, 0.6, 0.45),
    "phone": (390, 844, True, 0.25, 0.25),
    "small phone": (360, 640, True, 0.25, 0.25),
}
HOME = "http://127.0.0.1:30000"
TALL_PICTURE = 480 / 832
MARGIN = 1
"""Pixels that rounding may cost."""

ASK_ONCE = """() => {
    const ask = fetch;
    let asked = false;
    globalThis.fetch = (url, options) => {
        if (!String(url).endsWith("/v1/models")) return ask(url, options);
        if (asked) return new Promise(() => {});
        asked = true;
        return ask(url, options);
    };
}"""
"""The server's later answers would end a state that the tests show."""

ENTER = """async ([state, aspect]) => {
    document.body.dataset.state = state;
    document.documentElement.style.setProperty("--aspect", aspect);
    document.getElementById("sticks").hidden =
        !(["live", "paused"].includes(state) && document.body.dataset.pads === "sticks");
    for (let frames = 0; frames < 2; frames++) await new Promise(requestAnimationFrame);
}"""
"""Shows a state without a session."""

MEASURE = """async () => {
    for (let frames = 0; frames < 2; frames++) await new Promise(requestAnimationFrame);
    const box = (element) => {
        const { left, top, right, bottom } = element.getBoundingClientRect();
        return right > left ? [left, top, right, bottom] : null;
    };
    const all = (selector) => [...document.querySelectorAll(selector)].map(box).filter(Boolean);
    return {
        picture: all("#frame")[0],
        prompt: all("#prompt")[0],
        meters: all("#meters")[0] ?? null,
        sticks: all(".stick"),
        buttons: all(".tool:not([hidden]), .top button"),
        widths: [document.documentElement.scrollWidth, innerWidth],
    };
}"""
"""Boxes as [left, top, right, bottom]."""


def overlap(one: list[float], other: list[float]) -> bool:
    return all(min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) > MARGIN for axis in (0, 1))


class Sized:
    """The page in a window of one size."""

    def __init__(self, page, width: int, height: int) -> None:
        self.page, self.width, self.height = page, width, height
        page.set_viewport_size({"width": width, "height": height})

    def show(self, state: str, aspect: float = 832 / 480) -> dict:
        self.page.evaluate(ENTER, [state, str(aspect)])
        return self.measure()

    def measure(self) -> dict:
        boxes = self.page.evaluate(MEASURE)
        assert boxes["widths"][0] <= boxes["widths"][1], "the page scrolls sideways"
        return boxes

    def share(self, box: list[float]) -> float:
        return (box[2] - box[0]) * (box[3] - box[1]) / (self.width * self.height)

    def holds(self, box: list[float]) -> bool:
        left, top, right, bottom = box
        return min(left, top, self.width - right, self.height - bottom) >= -MARGIN


@pytest.fixture(scope="module")
def pages(chromium):
    """The loaded page with a mouse and with a touch screen. The tests change its size and what it shows."""
    found = {}
    with static_page() as url:
        for is_touched in (False, True):
            context = chromium.new_context(reduced_motion="reduce", has_touch=is_touched, is_mobile=is_touched)
            context.set_default_timeout(LIMIT_MS)
            context.add_init_script(f"({ASK_ONCE})()")
            page = found[is_touched] = context.new_page()
            FakeApi(page, HOME)
            page.goto(f"{url}?server={HOME}", wait_until="commit")
            page.wait_for_selector("#start:enabled")
        yield found
        for page in found.values():
            page.context.close()


@pytest.mark.parametrize("name", SIZES)
def test_the_picture_is_the_largest_thing(pages, name):
    """Before and during a session it takes its share of the window. Sticks and buttons are beside or below it."""
    width, height, is_touched, before, during = SIZES[name]
    sized = Sized(pages[is_touched], width, height)
    idle = sized.show("idle")
    assert sized.share(idle["picture"]) >= before, idle
    assert sized.holds(idle["picture"])
    live = sized.show("live")
    assert sized.share(live["picture"]) >= during, live
    assert len(live["sticks"]) == (2 if is_touched else 0)
    controls = live["sticks"] + live["buttons"]
    for number, box in enumerate(controls):
        assert sized.holds(box), box
        assert not overlap(box, live["picture"]), box
        assert not any(overlap(box, other) for other in controls[:number]), box


@pytest.mark.parametrize("name", ["desktop", "landscape", "tablet on its side"])
def test_the_prompt_is_in_view_before_the_start(pages, name):
    """Its first two lines at least."""
    width, height, is_touched, *_ = SIZES[name]
    sized = Sized(pages[is_touched], width, height)
    left, top, right, _ = sized.show("idle")["prompt"]
    assert sized.holds([left, top, right, top + 60])


@pytest.mark.parametrize(
    "name", ["small laptop", "phone on its side", "small phone on its side", "phone", "small phone"]
)
def test_a_long_note_fits_on_the_stage(pages, name):
    """The start button and three sentences below it."""
    width, height, is_touched, *_ = SIZES[name]
    sized = Sized(pages[is_touched], width, height)
    sized.show("idle")
    boxes = sized.page.evaluate(
        """() => {
            const note = document.getElementById("start-note");
            note.textContent = "Three sentences of a usual length may stand here. ".repeat(4);
            const boxes = ["stage", "start", "start-note", "start-keys"].map((id) => {
                const { top, bottom } = document.getElementById(id).getBoundingClientRect();
                return [top, bottom];
            });
            note.textContent = "";
            return boxes.filter(([top, bottom]) => bottom > top);
        }"""
    )
    (top, bottom), *inside = boxes
    assert len(inside) >= 2
    assert all(top <= box[0] and box[1] <= bottom for box in inside), boxes


def test_unused_keys_on_the_picture_fade(pages):
    """A key is back while it is held, and all of its side while the pointer is near."""
    page = Sized(pages[False], 1440, 900).page
    page.mouse.move(0, 0)
    page.evaluate(ENTER, ["live", "1.7"])
    opacities = """() => {
        for (const animation of document.getAnimations()) if (animation.animationName === "fade") animation.finish();
        return Object.fromEntries([...document.querySelectorAll(".pad")].map((pad) =>
            [pad.dataset.action, Number(getComputedStyle(pad).opacity)]));
    }"""
    assert set(page.evaluate(opacities)) == set("wasdijkl")
    assert set(page.evaluate(opacities).values()) == {0}
    page.evaluate("() => document.querySelector('[data-action=w]').classList.add('held')")
    assert {key for key, opacity in page.evaluate(opacities).items() if opacity} == {"w"}
    page.evaluate("() => document.querySelector('[data-action=w]').classList.remove('held')")
    page.hover("[data-action=k]", force=True)
    assert {key for key, opacity in page.evaluate(opacities).items() if opacity} == set("ijkl")
    page.mouse.move(0, 0)


@pytest.mark.parametrize("name", SIZES)
def test_everything_is_reachable_and_leaves_the_picture_its_size(pages, name):
    """During a session the prompt is in view or one click away. Meters and their details do not shrink the picture."""
    width, height, is_touched, *_ = SIZES[name]
    sized = Sized(pages[is_touched], width, height)
    page, picture = sized.page, sized.show("live")["picture"]
    page.click("#toggle-meters")
    page.click(".meters-more")
    shown = sized.measure()
    assert shown["picture"] == picture
    assert sized.holds(shown["meters"])
    page.click(".meters-more")
    page.click("#toggle-meters")
    button = page.locator("#open-sheet")
    is_closed = button.is_visible()
    if is_closed:
        button.click()
    page.focus("#prompt")
    left, top, right, _ = sized.measure()["prompt"]
    assert sized.holds([left, top, right, top + 40])
    if is_closed:
        page.click("#close-sheet")
    assert sized.measure()["picture"] == picture


@pytest.mark.parametrize("name", SIZES)
def test_a_tall_picture_fits_too(pages, name):
    """A session of 480x832 leaves the controls in the window at every size."""
    width, height, is_touched, *_ = SIZES[name]
    sized = Sized(pages[is_touched], width, height)
    live = sized.show("live", TALL_PICTURE)
    left, top, right, bottom = live["picture"]
    assert (right - left) / (bottom - top) == pytest.approx(TALL_PICTURE, rel=0.02)
    assert sized.share(live["picture"]) > 0.12
    for box in (live["picture"], *live["sticks"], *live["buttons"]):
        assert sized.holds(box), box
