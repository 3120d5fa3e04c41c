"""Measures key-to-frame latency on the web page with the page's own meter, in headless Chromium.

    lingbot-rt serve & python scripts/bench_page.py http://127.0.0.1:30000 --taps 40

A tap presses and releases a key at irregular times. Both events are measured, from sending the event to the first
drawn frame that carries it. Needs Chromium and the playwright package (`scripts/install dev`).
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics

from playwright.sync_api import Page, sync_playwright

KEYS = "wasdijkl"
TIMEOUT_MS = 60_000


def tap(page: Page, random_: random.Random) -> float:
    """Presses and releases a key. Returns the model time of the latest chunk in ms."""
    key = random_.choice(KEYS)
    page.keyboard.down(key)
    page.wait_for_timeout(random_.uniform(80, 500))
    page.keyboard.up(key)
    page.wait_for_timeout(random_.uniform(400, 1200))
    return float(page.inner_text(".stage-table div:has(dt:text('Model in all')) dd").removesuffix(" ms"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="URL of a running server")
    parser.add_argument("--taps", type=int, default=40, help="key taps to measure (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of keys and times (default: %(default)s)")
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(options.url)
        page.click("#start:enabled")
        page.wait_for_selector("body[data-state=live]")
        page.click("#toggle-meters")
        page.click(".meters-more")
        page.wait_for_selector(".stage-table")
        chunks = [tap(page, random_) for _ in range(options.taps)]
        page.wait_for_timeout(2000)
        print(page.inner_text(".stages > .hint"))
        print(f"Model time per chunk: median {statistics.median(chunks):.0f} ms, longest {max(chunks):.0f} ms")
        browser.close()


if __name__ == "__main__":
    main()
