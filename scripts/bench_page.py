"""Key to picture on the page, by its own meter, in headless Chromium.

    lingbot-rt serve & python scripts/bench_page.py http://127.0.0.1:30000 --taps 40

Each tap is a key pressed and let go at irregular times; both are measured, from the event's sending to the first drawn
picture that carries it. Needs Chromium and the playwright package (`scripts/install dev`).
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics

from playwright.sync_api import Page, sync_playwright

KEYS = "wasdijkl"
LIMIT_MS = 60_000


def tap(page: Page, random_: random.Random) -> float:
    """Presses and lets go of a key -> what the latest chunk took the model, in ms."""
    key = random_.choice(KEYS)
    page.keyboard.down(key)
    page.wait_for_timeout(random_.uniform(80, 500))
    page.keyboard.up(key)
    page.wait_for_timeout(random_.uniform(400, 1200))
    return float(page.inner_text(".stage-table div:has(dt:text('Model in all')) dd").removesuffix(" ms"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="a served page")
    parser.add_argument("--taps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(LIMIT_MS)
        page.goto(options.url)
        page.click("#start:enabled")
        page.wait_for_selector("body[data-state=live]")
        page.click("#toggle-meters")
        page.click(".meters-more")
        page.wait_for_selector(".stage-table")
        chunks = [tap(page, random_) for _ in range(options.taps)]
        page.wait_for_timeout(2000)
        print(page.inner_text(".stages > .hint"))
        print(f"Model time of a chunk: median {statistics.median(chunks):.0f} ms, longest {max(chunks):.0f} ms")
        browser.close()


if __name__ == "__main__":
    main()
