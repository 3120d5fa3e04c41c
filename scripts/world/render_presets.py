"""Renders the page's presets: six views of the true world, from which a session can start.

    python -m scripts.world.render_presets [names ...]

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
    # id: name, x, z, yaw, look, prompt. The yaw is one that keys reach, as in all walks of the training.
    "village": ("Village", 1.0, 1.9, 60, "day", "A village on a sunny day, a tower with a violet roof, a windmill, a "
                "pink tree, a path through green meadows."),
    "gate": ("Red gate", 0.0, 1.9, 180, "day", "A path leads through a red gate on a bright day, a lighthouse and a "
             "dark pine beside it, white clouds in a blue sky."),
    "windmill": ("Windmill", 2.6, 1.7, 18, "day", "A white windmill with a blue cap in green meadows, mountains behind "
                 "it, a clear sunny day."),
    "sunset": ("Evening", 0.3, 2.1, 42, "sunset", "A house with a red roof at sunset, warm light, lamps in the "
               "windows, a pink and orange sky."),
    "night": ("Night", 2.0, 2.4, 0, "night", "A tower with lit windows at night, a pine and a lighthouse in the dark, "
              "stars in the sky."),
    "snow": ("First snow", 0.1, 2.0, 48, "snow", "A house in winter, fresh snow on its roof and on the meadows, a "
             "windmill far away in the mist."),
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
