"""Makes the animation at the top of the README: the page with the built-in world, while keys are held.

    python -m scripts.readme_picture

Starts `lingbot-rt serve` on a free port, opens the page in headless Chromium, starts a session, holds W, then L, and
writes docs/images/page.webp. Needs Chromium and the playwright package (`scripts/install dev`).

Every image is a screenshot of the running page. A CPU is slower than real time, so the animation shows each image for
at most LONGEST_MS. Its timing is then not that of the session, so the latency reading and the waiting notice are
hidden. A GPU that keeps up is shown in real time.
"""

from __future__ import annotations

import argparse
import base64
import io
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page

from scripts.bench_page import chromium_page

OUT = Path(__file__).parents[1] / "docs" / "images" / "page.webp"
PAGE = {"width": 1440, "height": 810}
WIDTH = 960
MAX_BYTES = 1_500_000
QUALITIES = (80, 65, 50, 35)

IDLE_MS = 900
"""How long the page before the start is shown."""
LONGEST_MS = 80
IMAGES_PER_KEY = 24
START_LIMIT_S = 240
CAPTURE_LIMIT_S = 300
HIDE_TIMING = """() => {
    for (const id of ["latency-pill", "stall"]) document.getElementById(id).style.visibility = "hidden";
}"""


@contextmanager
def running_server(device: str) -> Iterator[str]:
    """Starts a server with the built-in world on a free port. Yields its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model-path", "builtin", "--device", device, "--port", str(port), "--warmup", "false"]
    with subprocess.Popen([sys.executable, "-m", "lingbot_rt", "serve", *flags]) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            limit = time.monotonic() + START_LIMIT_S
            while not _is_healthy(url):
                if process.poll() is not None or time.monotonic() > limit:
                    raise SystemExit("the server did not start")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # not listening yet, or 503 while it loads
        return False


class Screencast:
    """Screenshots of the page, one per change of the video or its controls: (seconds, image)."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._shots: list[tuple[float, Image.Image]] = []
        box = page.locator("#frame").bounding_box()
        assert box is not None
        self._video = (int(box["x"]), int(box["y"]), int(box["x"] + box["width"]), int(box["y"] + box["height"]))
        self._session = page.context.new_cdp_session(page)
        self._session.on("Page.screencastFrame", self._add)
        self._session.send("Page.startScreencast", {"format": "png", "everyNthFrame": 1})

    def _add(self, event: dict[str, Any]) -> None:
        image = _from_png(base64.b64decode(event["data"]))
        if not self._shots or image.crop(self._video) != self._shots[-1][1].crop(self._video):
            self._shots.append((event["metadata"]["timestamp"], image))
        self._session.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})

    def wait_for(self, count: int) -> None:
        """Waits until ``count`` more images have been captured."""
        wanted = len(self._shots) + count
        limit = time.monotonic() + CAPTURE_LIMIT_S
        while len(self._shots) < wanted:
            if time.monotonic() > limit:
                raise SystemExit("the video stands still")
            self._page.wait_for_timeout(20)

    def stop(self) -> list[tuple[float, Image.Image]]:
        """Ends the capture. Returns the images in the order of their time."""
        self._session.send("Page.stopScreencast")
        return sorted(self._shots, key=lambda shot: shot[0])


def _from_png(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def capture(page: Page, preset: str, size: str) -> tuple[list[Image.Image], list[int]]:
    """Plays a short session. Returns screenshots and how long each is shown, in ms."""
    page.click("#advanced summary")
    page.select_option("#set-size", size)
    page.click("#advanced summary")
    page.click(f"[data-preset={preset}]")
    page.wait_for_selector(f"[data-preset={preset}][aria-pressed=true]")
    page.evaluate(HIDE_TIMING)
    idle = _from_png(page.screenshot())
    page.click("#start")
    page.wait_for_selector("body[data-state=live]", timeout=1000 * CAPTURE_LIMIT_S)
    screencast = Screencast(page)
    for key in "wl":
        page.keyboard.down(key)
        screencast.wait_for(IMAGES_PER_KEY)
        page.keyboard.up(key)
    shots = screencast.stop()
    times = [at for at, _ in shots]
    gaps = [round(1000 * (later - earlier)) for earlier, later in pairwise(times)]
    durations = [min(max(gap, 1), LONGEST_MS) for gap in gaps]
    return [idle, *(image for _, image in shots)], [IDLE_MS, *durations, LONGEST_MS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", default="village")
    parser.add_argument("--size", default="160x96")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    look = {"viewport": PAGE, "color_scheme": "dark", "reduced_motion": "reduce"}
    with running_server(options.device) as url, chromium_page(url, **look) as page:
        shots, durations = capture(page, options.preset, options.size)
    size = (WIDTH, WIDTH * PAGE["height"] // PAGE["width"])
    images = [shot.resize(size, Image.Resampling.LANCZOS) for shot in shots]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for quality in QUALITIES:
        images[0].save(
            options.out, save_all=True, append_images=images[1:], duration=durations, loop=0, quality=quality, method=4
        )
        if options.out.stat().st_size <= MAX_BYTES:
            break
    length_s, kilobytes = sum(durations) / 1000, options.out.stat().st_size / 1000
    print(f"{options.out}: {len(images)} images, {length_s:.1f} s, {kilobytes:.0f} kB, quality {quality}")


if __name__ == "__main__":
    main()
