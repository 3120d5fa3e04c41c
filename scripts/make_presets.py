"""Renders the page's six places to begin: small low-poly worlds, drawn by preset_renderer.py.

    python scripts/make_presets.py [names ...]

Same seed, same pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from preset_renderer import (
    Camera,
    Look,
    Mesh,
    Renderer,
    blob,
    box,
    broadleaf,
    develop,
    fractal,
    frustum,
    noise,
    pine,
    rgb,
    roof,
    terrain,
)

OUT = Path(__file__).parent.parent / "webui" / "presets"
QUALITY = 78

# --- looks ---

DAY = Look(
    (-0.55, 0.62, -0.25), rgb("#fff2d8") * 2.5, rgb("#3f86d6"), rgb("#cfe6f4"), rgb("#a9c8e8") * 0.62, 0.30, clouds=0.95
)
SUNSET = Look(
    (0.28, 0.105, 1),
    rgb("#ff9a52") * 3.2,
    rgb("#39437f"),
    rgb("#ffb27a"),
    rgb("#a884a8") * 0.52,
    0.42,
    disc=rgb("#fff0c8") * 6,
    clouds=0.9,
    water=rgb("#5a4a6a"),
)
NIGHT = Look(
    (-0.34, 0.30, 1),
    rgb("#9db8e8") * 0.62,
    rgb("#070d22"),
    rgb("#22345c"),
    rgb("#4a66a0") * 0.17,
    0.32,
    disc=rgb("#f4f2e2") * 3,
    stars=260,
    exposure=1.5,
    clouds=0.25,
    water=rgb("#0c1730"),
)
SNOW = Look(
    (0.6, 0.5, -0.2),
    rgb("#ffe9d0") * 1.35,
    rgb("#a8bdd2"),
    rgb("#e8edf2"),
    rgb("#c4d4e8") * 0.75,
    0.55,
    clouds=0.5,
    water=rgb("#6f8ea4"),
)
RAIN = Look(
    (-0.3, 0.8, 0.4), rgb("#8fa3c8") * 0.75, rgb("#26304a"), rgb("#5d6680"), rgb("#7385ad") * 0.62, 0.86, exposure=1.0
)
COAST = Look(
    (0.5, 0.5, -0.35),
    rgb("#fff0d2") * 2.6,
    rgb("#2f7fcf"),
    rgb("#d3ecf2"),
    rgb("#a8cfe6") * 0.6,
    0.22,
    clouds=0.8,
    water=rgb("#1c7a8c"),
)


# --- places ---


def valley_height(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    hills = 1.6 * fractal(x / 16, z / 16, 2) + 0.25 * noise(x / 1.7, z / 1.7, 8)
    lake = -3.1 * np.exp(-(((x + 5 + 2 * noise(z / 9, z / 30, 4)) / 9) ** 2) - ((z - 30) / 17) ** 2)
    sides = 0.012 * np.clip(np.abs(x - 2) - 7, 0, 60) ** 1.75
    mountains = np.clip((z - 62) / 46, 0, 1) ** 1.5 * (15 + 19 * fractal(x / 21 + 3, z / 25, 22, 5))
    return (
        0.6
        + hills * np.clip((np.abs(x - 3) + np.abs(z) * 0.12 - 2) / 9, 0.12, 1)
        + lake
        + sides
        + np.clip(mountains, 0, 60)
    )


def path_x(z: np.ndarray) -> np.ndarray:
    return 2.2 + 1.5 * np.sin(z / 7)


def valley(winter: bool = False) -> Mesh:
    mesh, rng = Mesh(), np.random.default_rng(11)

    def color(centre: np.ndarray, normal: np.ndarray) -> np.ndarray:
        x, y, z = centre.T
        shade = 1 + 0.22 * noise(x * 1.3, z * 1.3, 3)[:, None] + rng.uniform(-0.08, 0.08, (len(x), 1))
        grass, meadow = rgb("#5f9440"), rgb("#93ad4f")
        mix = np.clip(0.5 + fractal(x / 8, z / 8, 14), 0, 1)[:, None]
        out = grass * (1 - mix) + meadow * mix
        steep = np.clip((0.80 - normal[:, 1]) * 6 + (y - 9) / 8, 0, 1)[:, None]
        out = out + (rgb("#7d7a78") - out) * steep
        high = np.clip((y - 17 - 4 * noise(x / 5, z / 5, 19)) / 4, 0, 1)[:, None]
        out = out + (rgb("#f2f5fa") - out) * high
        shore = np.clip((0.28 - y) / 0.25, 0, 1)[:, None]
        out = out + (rgb("#cdb98a") - out) * shore
        path = np.clip(1.35 - np.abs(x - path_x(z)) / 0.75, 0, 1)[:, None] * (z < 34)[:, None]
        out = out + (rgb("#cbb084") - out) * path
        if winter:
            cover = np.clip(normal[:, 1:2] * 2.4 - 0.95, 0, 1)
            out = out + (rgb("#eef2f8") - out) * cover * (1 - 0.55 * path)
        return out * shade

    terrain(mesh, valley_height, color, (-130, 130), (-1, 120), (120, 120))
    for _ in range(420):
        z = rng.uniform(4, 78)
        x = rng.uniform(-1, 1) * (10 + 0.65 * z)
        y = float(valley_height(np.array(x), np.array(z)))
        clear = (
            abs(x - float(path_x(np.array(z)))) > 1.7
            and y > 0.45
            and y < 11
            and not (abs(x - 8.4) < 3 and abs(z - 17) < 4)
        )
        if not clear or (z < 20 and abs(x - 2) < 3.4):
            continue
        size = rng.uniform(0.9, 1.9)
        if rng.random() < 0.78 or winter:
            pine(mesh, (x, y - 0.1, z), size, rgb("#2f6b46"), rng, snow=0.75 if winter else 0.0)
        else:
            broadleaf(mesh, (x, y - 0.1, z), size * 0.9, rgb(rng.choice(["#c98a35", "#86a544", "#b5a23e"])), rng)
    cabin(mesh, 8.4, 17.0, winter)
    for _ in range(60):
        z = rng.uniform(2, 30)
        x = float(path_x(np.array(z))) + rng.choice([-1, 1]) * rng.uniform(0.9, 4)
        y = float(valley_height(np.array(x), np.array(z)))
        if y > 0.2:
            blob(mesh, (x, y, z), rng.uniform(0.08, 0.26), rgb("#8c8a86"), rng)
    return mesh


def cabin(mesh: Mesh, x: float, z: float, winter: bool) -> None:
    y = float(valley_height(np.array(x), np.array(z))) - 0.1
    box(mesh, (x - 1.5, y, z - 1.6), (x + 1.5, y + 1.7, z + 1.6), rgb("#9a5f3c"))
    roof(
        mesh,
        (x - 1.95, y + 1.6, z - 1.95),
        (x + 1.95, y + 1.6, z + 1.95),
        y + 3.2,
        rgb("#eef2f8") if winter else rgb("#7a2f2a"),
    )
    box(mesh, (x + 0.7, y + 2.2, z + 0.3), (x + 1.15, y + 3.6, z + 0.75), rgb("#6f6a66"))
    for wx in (-0.95, 0.4):
        box(mesh, (x + wx, y + 0.65, z - 1.64), (x + wx + 0.55, y + 1.2, z - 1.58), rgb("#ffc873"), glow=2.2)
    box(mesh, (x - 0.22, y, z - 1.63), (x + 0.26, y + 1.05, z - 1.58), rgb("#4c2f20"))
    box(mesh, (x - 1.54, y + 0.65, z - 0.4), (x - 1.48, y + 1.2, z + 0.4), rgb("#ffc873"), glow=2.2)


def alley() -> Mesh:
    mesh, rng = Mesh(), np.random.default_rng(4)
    for z in np.arange(-1, 60, 0.8):
        for x in np.arange(-2.8, 2.8, 0.8):
            tone = rgb("#4b4e57") * rng.uniform(0.75, 1.2)
            box(mesh, (x + 0.02, -0.4, z + 0.02), (x + 0.78, rng.uniform(-0.015, 0.0), z + 0.78), tone)
    walls = ["#7c5a4c", "#6b6a70", "#8a6f58", "#59606b", "#6f4f49"]
    for side in (-1, 1):
        z = -2.0
        while z < 58:
            depth, height = rng.uniform(4, 7), rng.uniform(6.5, 11)
            front = 2.5 + rng.uniform(0, 0.5)
            x0, x1 = sorted((side * front, side * (front + 6)))
            box(mesh, (x0, -0.4, z), (x1, height, z + depth), rgb(str(rng.choice(walls))) * rng.uniform(0.8, 1.15))
            box(mesh, (x0 - 0.15, height, z - 0.1), (x1 + 0.15, height + 0.3, z + depth + 0.1), rgb("#3c3a40"))
            face = side * (front - 0.03)
            for floor in np.arange(1.0, height - 1.4, 1.9):
                for wz in np.arange(z + 0.7, z + depth - 0.9, 1.5):
                    lit = rng.random() < 0.42
                    tone = rgb(str(rng.choice(["#ffb45e", "#ffd08a", "#ff9a4a"]))) if lit else rgb("#1d2430")
                    low, high = sorted((face, face + side * 0.1))
                    box(mesh, (low, floor, wz), (high, floor + 1.1, wz + 0.75), tone, glow=0.75 if lit else 0.0)
                    box(
                        mesh,
                        (low - 0.06, floor - 0.1, wz - 0.06),
                        (high + 0.06, floor - 0.02, wz + 0.81),
                        rgb("#2d2c30"),
                    )
            if rng.random() < 0.75:
                low, high = sorted((face, face - side * 0.9))
                sign = rgb(str(rng.choice(["#36c6b4", "#ff5f6d", "#f2b13c"])))
                sz = z + rng.uniform(0.8, depth - 1)
                box(mesh, (low + 0.2, 2.6, sz), (high - 0.25, 3.2, sz + 0.1), sign, glow=1.0)
            z += depth
    for i, z in enumerate((5.5, 12, 19, 27, 36)):
        x = -2.1 if i % 2 else 2.1
        frustum(mesh, (x, 0, z), 0.07, 0.05, (0, 3.1), rgb("#1c1e22"), 6)
        blob(mesh, (x, 3.25, z), 0.2, rgb("#ffd79a"), rng, glow=4)
    for x, z in ((-1.9, 4.2), (2.0, 8.4), (-2.0, 15.0)):
        box(mesh, (x - 0.3, 0, z - 0.3), (x + 0.3, 0.6, z + 0.3), rgb("#5d4632"))
        blob(mesh, (x, 0.75, z), 0.36, rgb("#2e5a3a"), rng)
    return mesh


def coast_height(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    shore = 3.2 - 0.16 * z + 2.2 * noise(z / 9, z * 0 + 3, 6)
    land = x - shore
    cliff = 5.2 / (1 + np.exp(-(land - 7 + 2 * noise(x / 4, z / 4, 9)) * 1.1)) * np.clip((z - 6) / 12, 0, 1)
    beach = np.clip(land * 0.16, -2.5, 1.1)
    cape = 3.4 * np.exp(-(((x + 1.5) / 7.5) ** 2) - ((z - 44) / 9) ** 2)
    far = np.clip((z - 85) / 20, 0, 1) * (7 + 7 * fractal(x / 15, z / 20, 41)) * (x > -10)
    return beach + cliff + cape + 0.22 * noise(x / 1.4, z / 1.4, 15) + far


def coast() -> Mesh:
    mesh, rng = Mesh(), np.random.default_rng(21)

    def color(centre: np.ndarray, normal: np.ndarray) -> np.ndarray:
        x, y, z = centre.T
        shade = 1 + 0.14 * noise(x * 1.7, z * 1.7, 3)[:, None] + rng.uniform(-0.05, 0.05, (len(x), 1))
        out = np.broadcast_to(rgb("#ead9ab"), centre.shape)
        grass = np.clip((y - 1.5) / 0.5, 0, 1)[:, None]
        out = out + (rgb("#7fa04c") - out) * grass
        steep = np.clip((0.82 - normal[:, 1]) * 5, 0, 1)[:, None] * (y > 0.4)[:, None]
        out = out + (rgb("#b59a80") - out) * steep
        wet = np.clip((0.16 - y) / 0.16, 0, 1)[:, None]
        return (out + (rgb("#a58f68") - out) * wet) * shade

    terrain(mesh, coast_height, color, (-90, 90), (-1, 112), (120, 110))
    x, z = -1.5, 43.0
    y = float(coast_height(np.array(x), np.array(z))) - 0.3
    for i in range(5):
        low, high = 1.15 - 0.11 * i, 1.15 - 0.11 * (i + 1)
        frustum(mesh, (x, y, z), low, high, (1.7 * i, 1.7 * (i + 1)), rgb("#d8473b") if i % 2 else rgb("#f5f1e8"), 14)
    frustum(mesh, (x, y, z), 0.95, 0.95, (8.5, 8.75), rgb("#33383d"), 14)
    frustum(mesh, (x, y, z), 0.5, 0.5, (8.75, 9.7), rgb("#ffe9a8"), 10, glow=1.4)
    frustum(mesh, (x, y, z), 0.75, 0.05, (9.7, 10.6), rgb("#b8382f"), 12)
    box(mesh, (x + 1.6, y, z - 1), (x + 4.2, y + 1.5, z + 1.2), rgb("#f1ebdf"))
    roof(mesh, (x + 1.4, y + 1.45, z - 1.2), (x + 4.4, y + 1.45, z + 1.4), y + 2.6, rgb("#b0483a"))
    for _ in range(130):
        px, pz = rng.uniform(-3, 30), rng.uniform(7, 60)
        py = float(coast_height(np.array(px), np.array(pz)))
        if py > 2.2 and abs(px - x) > 3.4:
            (pine if rng.random() < 0.5 else broadleaf)(
                mesh, (px, py - 0.1, pz), rng.uniform(0.6, 1.2), rgb("#4c7f45"), rng
            )
    for _ in range(46):
        pz = rng.uniform(3, 40)
        px = 3.2 - 0.16 * pz + rng.uniform(-3.5, 1.6)
        blob(
            mesh, (px, float(coast_height(np.array(px), np.array(pz))), pz), rng.uniform(0.12, 0.6), rgb("#8d8078"), rng
        )
    sail(mesh, -9.5, 38)
    sail(mesh, -19, 70)
    return mesh


def sail(mesh: Mesh, x: float, z: float) -> None:
    box(mesh, (x - 1.1, -0.1, z - 0.35), (x + 1.1, 0.35, z + 0.35), rgb("#6b4a34"))
    mesh.add(
        np.array(
            [
                [[x - 0.1, 0.5, z], [x - 0.1, 3.6, z], [x + 1.3, 0.6, z]],
                [[x - 0.2, 0.5, z], [x - 1.0, 0.6, z], [x - 0.2, 3.1, z]],
            ]
        ),
        rgb("#fbf7ee"),
    )


PLACES = {
    "valley": lambda: develop(Renderer(valley(), DAY, Camera((2.0, 2.5, 0.0), -3)).render(0.0), 1.0),
    "sunset": lambda: develop(Renderer(valley(), SUNSET, Camera((-0.5, 2.3, 4.0), -1)).render(0.0), 1.0),
    "night": lambda: develop(Renderer(valley(), NIGHT, Camera((1.0, 2.1, 2.0), 0)).render(0.0), NIGHT.exposure),
    "snow": lambda: develop(
        Renderer(valley(winter=True), SNOW, Camera((3.4, 2.6, 0.5), -3)).render(0.0), 0.95, snow=900
    ),
    "alley": lambda: develop(
        Renderer(alley(), RAIN, Camera((0.2, 1.65, -0.5), 2)).render(0.0, wet=0.95, ripple=0.02),
        RAIN.exposure,
        rain=1.0,
    ),
    "coast": lambda: develop(Renderer(coast(), COAST, Camera((-0.5, 2.4, -0.5), -3)).render(0.0, ripple=0.07), 1.0),
}


def main(names: list[str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names or PLACES:
        file = OUT / f"{name}.webp"
        PLACES[name]().save(file, "WEBP", quality=QUALITY, method=6)
        print(f"{file} {file.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
