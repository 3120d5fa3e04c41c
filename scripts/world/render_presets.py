"""Renders the page's presets: six views of the true world, from which a session can start.

    python -m scripts.world.render_presets [names ...]

The places below are of an earlier world of 3 x 3 units, as are the pictures in webui/presets: choose new ones before
the next call.

Also writes presets.json, in which every prompt asks for the look of its picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from lingbot_rt.shapes import FrameSize
from scripts.world.render import Renderer
from scripts.world.scene import LOOKS
from scripts.world.trajectories import View

OUT = Path(__file__).parents[2] / "webui" / "presets"
SIZE = FrameSize(840, 504)  # 5:3, the built-in world's own shape
QUALITY = 84

_STEADY = "Steady camera at eye height."
PRESETS = {
    # id: name, x, z, yaw, look, prompt
    "plaza": ("Plaza", 0.02, 2.5, 184, "day", "A little village on a sunny day, a fountain on a plaza, a red gate, "
              "a house with a red roof, a striped balloon."),
    "windmill": ("Windmill", 1.2, 1.6, -20, "day", "A white windmill and a red and white lighthouse in green meadows "
                 "on a bright day, white clouds in a blue sky."),
    "sunset": ("Evening", 2.75, 1.55, -62, "sunset", "The village at sunset, a low orange sun behind a pavilion, "
               "long shadows over the path, glowing lamps."),
    "night": ("Night", 0.02, 0.02, 5, "night", "The village at night, seen through a red gate, street lamps glowing "
              "under the stars."),
    "snow": ("First snow", 1.6, 1.4, 150, "snow", "The village in winter, fresh snow on roofs and trees, a frozen "
             "pond, a giant mushroom capped with white."),
    "gate": ("Red gate", 0.9, 1.0, 200, "sunset", "A red gate, an orange tree and a lighthouse in warm evening light, "
             "a pink and orange sky."),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="ids of presets (default: all)")
    wanted = parser.parse_args().names
    OUT.mkdir(parents=True, exist_ok=True)
    renderer = Renderer(SIZE, supersample=3)
    names = [look.name for look in LOOKS]
    lines = []
    for name, (title, x, z, yaw, look, prompt) in PRESETS.items():
        entry = {"id": name, "name": title, "picture": f"{name}.webp", "prompt": f"{prompt} {_STEADY}"}
        lines.append("  " + json.dumps(entry))
        if wanted and name not in wanted:
            continue
        view = View(*(np.array([float(value)]) for value in (x, z, yaw, 0)))
        picture = renderer.render(view.poses(), [names.index(look)])[0].numpy()
        file = OUT / f"{name}.webp"
        Image.fromarray(picture).save(file, "WEBP", quality=QUALITY, method=6)
        print(f"{file} {file.stat().st_size} bytes")
    (OUT / "presets.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
