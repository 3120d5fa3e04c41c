"""Measures key-to-frame latency on the page, in headless Chromium, with the page's own meters.

    lingbot-rt serve & python scripts/bench_page.py http://127.0.0.1:30000 --taps 40

Each tap presses and releases a random key at irregular times. Both events are measured, from the sending of the event
to the first drawn frame that carries it. Needs Chromium and the playwright package (`scripts/install dev`).
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

KEYS = "wasdijkl"
LIMIT_MS = 60_000


@contextmanager
def chromium_page(url: str, **context: Any) -> Iterator[Page]:
    """Opens ``url`` in headless Chromium and waits until a session can be started."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(**context)
        page.set_default_timeout(LIMIT_MS)
        page.goto(url)
        page.wait_for_selector("#start:enabled")
        yield page
        browser.close()


def tap(page: Page, random_: random.Random) -> float:
    """Presses and releases a key. Returns the engine's time for the latest chunk, in ms."""
    key = random_.choice(KEYS)
    page.keyboard.down(key)
    page.wait_for_timeout(random_.uniform(80, 500))
    page.keyboard.up(key)
    page.wait_for_timeout(random_.uniform(400, 1200))
    return float(page.inner_text(".stage-table div:has(dt:text('Engine total')) dd").removesuffix(" ms"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of a running server")
    parser.add_argument("--taps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    with chromium_page(options.url, viewport={"width": 1440, "height": 900}) as page:
        page.click("#start")
        page.wait_for_selector("body[data-state=live]")
        page.click("#toggle-meters")
        page.click(".meters-more")
        page.wait_for_selector(".stage-table")
        chunks = [tap(page, random_) for _ in range(options.taps)]
        page.wait_for_timeout(2000)
        print(page.inner_text(".stages > .hint"))
        print(f"Engine time per chunk: median {statistics.median(chunks):.0f} ms, longest {max(chunks):.0f} ms")


if __name__ == "__main__":
    main()
