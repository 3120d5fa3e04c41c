"""The real page in headless Chromium against the real server with the built-in world."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.served import Server, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

DESKTOP = {"width": 1440, "height": 900}
BUILTIN = ("--model-path", "builtin", "--device", "cpu", "--session-wait-s", "10", "--warmup", "false")

LIMIT_MS = 120_000
"""Time limit of every wait. It is generous, since a loaded machine is slow. A passing test does not reach it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/browser" in item.path.as_posix():
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """One browser per module. Each test has its own context, like a new visitor.

    Module scope, since Playwright keeps an event loop running in this thread and asyncio tests of other modules fail
    beside it.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(chromium, tmp_path_factory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("serve"), *BUILTIN) as it:
        yield it


class Visitor:
    """A page and the problems it reported on the console."""

    def __init__(self, browser, **context) -> None:
        self.context = browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", **context})
        self.context.set_default_timeout(LIMIT_MS)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.expected: tuple[str, ...] = ()  # problems that contain one of these texts are ignored
        self.requests: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda socket: self.requests.append(socket.url))

    def _heard(self, message) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text} ({message.location.get('url')})")

    def open(self, url: str) -> None:
        self.page.goto(url, wait_until="commit")
        self.page.wait_for_selector("#start:enabled")

    def start(self) -> None:
        self.page.click("#start")
        self.wait_for_state("live")

    def wait_for_state(self, state: str) -> None:
        """Waits until the session is in ``state``. The error says what the page shows instead."""
        try:
            self.page.wait_for_selector(f"body[data-state={state}]")
        except Exception as error:
            shown = self.page.evaluate("() => document.body.dataset.state + ': ' + document.body.innerText")
            error.add_note("\n".join([shown, *self.problems]))
            raise

    def wait_until(self, is_true: Callable[[], bool], failure: str) -> None:
        """Waits for something outside the page, while Playwright's events are handled."""
        limit = time.monotonic() + LIMIT_MS / 1000
        while not is_true():
            assert time.monotonic() < limit, failure
            self.page.wait_for_timeout(20)

    def restart_by(self, restart: Callable[[], object]) -> None:
        """Calls ``restart`` and waits until the new session is live. The old one may be live when this is called."""
        self.page.evaluate("() => document.querySelectorAll('#timeline li').forEach((entry) => (entry.id = 'before'))")
        restart()
        self.page.wait_for_selector("#timeline li:not(#before)", state="attached")
        self.wait_for_state("live")

    def pixels(self) -> list[int]:
        """The current video frame, shrunk to 20x20 RGBA."""
        return self.page.evaluate(
            """() => {
                const copy = new OffscreenCanvas(20, 20);
                const context = copy.getContext("2d", { willReadFrequently: true });
                context.drawImage(document.getElementById("canvas"), 0, 0, 20, 20);
                return [...context.getImageData(0, 0, 20, 20).data];
            }"""
        )

    def wait_for_change(self, before: list[int]) -> list[int]:
        return self._wait_for_pixels(lambda now: now != before, "the video stands still")

    def wait_for_stillness(self, calm_ms: int = 500) -> list[int]:
        """Waits until the video shows the same frame twice, ``calm_ms`` apart."""
        seen: list[list[int]] = []

        def is_still(now: list[int]) -> bool:
            seen.append(now)
            return seen[-2:-1] == [now]

        return self._wait_for_pixels(is_still, "the video goes on", calm_ms)

    def _wait_for_pixels(self, accept: Callable[[list[int]], bool], failure: str, every_ms: int = 50) -> list[int]:
        limit = time.monotonic() + LIMIT_MS / 1000
        while time.monotonic() < limit:
            now = self.pixels()
            if accept(now):
                return now
            self.page.wait_for_timeout(every_ms)
        raise AssertionError(failure)


@pytest.fixture
def make_visitor(chromium) -> Iterator:
    """Makes visitors. The test fails if a page reports a problem."""
    visitors: list[Visitor] = []

    def make(**context) -> Visitor:
        visitors.append(Visitor(chromium, **context))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.context.close()
    unexpected = [text for v in visitors for text in v.problems if not any(part in text for part in v.expected)]
    assert unexpected == []


@pytest.fixture
def visitor(make_visitor) -> Visitor:
    return make_visitor()
