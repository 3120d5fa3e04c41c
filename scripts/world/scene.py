"""The world's data: landmarks, their positions, and the four looks. render.py renders it.

Axes: x right, h up, z forward. The world is a torus of PERIOD x PERIOD units, so it has no edge. Landmarks are large
and have few flat colours. Each kind is different, so that one landmark in view tells the position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

PERIOD = 4.0
EYE_HEIGHT = 0.35

Colour = tuple[float, float, float]


def rgb(text: str) -> Colour:
    """``"#rrggbb"`` -> 0..1."""
    return int(text[1:3], 16) / 255, int(text[3:5], 16) / 255, int(text[5:7], 16) / 255


@dataclass(frozen=True, slots=True)
class Paint:
    colour: Colour
    second: Colour | None = None  # colour of every other band or panel
    bands: int = 0  # equal slices over the height
    panels: int = 0  # equal slices around the vertical axis
    glow: float = 0.0  # share of its own light in dark looks
    snow: bool = True  # white on top in the snow look


@dataclass(frozen=True, slots=True)
class Polyhedron:
    """Convex: the points p with normal . (p - centre) <= offset for each of at most six planes."""

    centre: tuple[float, float, float]
    planes: tuple[tuple[float, float, float, float], ...]  # unit normal and offset
    bounding_radius: float  # largest distance of a point from the centre
    half_height: float
    paint: Paint


@dataclass(frozen=True, slots=True)
class Frustum:
    """A truncated cone around a vertical axis; also cylinders and cones."""

    centre: tuple[float, float, float]  # at half its height
    low: float  # radius at the foot
    high: float  # radius at the top
    half_height: float
    paint: Paint


@dataclass(frozen=True, slots=True)
class Ellipsoid:
    """An ellipsoid of revolution around a vertical axis."""

    centre: tuple[float, float, float]
    radius: float
    half_height: float
    paint: Paint


Shape = Polyhedron | Frustum | Ellipsoid


@dataclass(frozen=True, slots=True)
class Landmark:
    """Shapes at a position on the ground. They sink into it when the camera comes nearer than ``sink_radius``."""

    x: float
    z: float
    shapes: tuple[Shape, ...]
    sink_radius: float  # distance at which it begins to sink; at 65 % of it, it is below the ground

    @property
    def height(self) -> float:
        return max(shape.centre[1] + shape.half_height for shape in self.shapes)


def box(x: float, h: float, z: float, size: tuple[float, float, float], paint: Paint, turn: float = 0) -> Polyhedron:
    """``size`` = width (x), height, depth (z); ``h`` is the foot, ``turn`` degrees around the vertical axis."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    w, t, d = (side / 2 for side in size)
    planes = ((c, 0, s, w), (-c, 0, -s, w), (0, 1, 0, t), (0, -1, 0, t), (-s, 0, c, d), (s, 0, -c, d))
    return Polyhedron((x, h + t, z), planes, math.hypot(w, t, d), t, paint)


def gable(x: float, h: float, z: float, size: tuple[float, float, float], paint: Paint) -> Polyhedron:
    """A roof with its ridge along x."""
    w, t, d = (side / 2 for side in size)
    slope = math.hypot(2 * t, d)
    a, b, low = d / slope, 2 * t / slope, t * d / slope
    planes = ((0, a, b, low), (0, a, -b, low), (0, -1, 0, t), (1, 0, 0, w), (-1, 0, 0, w))
    return Polyhedron((x, h + t, z), planes, math.hypot(w, t, d), t, paint)


def pyramid(x: float, h: float, z: float, side: float, height: float, paint: Paint, turn: float = 0) -> Polyhedron:
    t, half = height / 2, side / 2
    slope = math.hypot(height, half)
    a, b, low = half / slope, height / slope, t * half / slope
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    around = ((c, s), (-c, -s), (-s, c), (s, -c))
    planes = (*((b * nx, a, b * nz, low) for nx, nz in around), (0.0, -1.0, 0.0, t))
    return Polyhedron((x, h + t, z), planes, math.hypot(t, half * math.sqrt(2)), t, paint)


def cone(x: float, h: float, z: float, low: float, high: float, height: float, paint: Paint) -> Frustum:
    return Frustum((x, h + height / 2, z), low, high, height / 2, paint)


def ball(x: float, h: float, z: float, radius: float, paint: Paint, half_height: float | None = None) -> Ellipsoid:
    """``h`` is its centre."""
    return Ellipsoid((x, h, z), radius, half_height or radius, paint)


WHITE, CREAM, STONE = rgb("#f6f1e6"), rgb("#ead9b8"), rgb("#b9b4ac")
RED, ORANGE, GOLD, PINK = rgb("#d63a2f"), rgb("#ee7f2d"), rgb("#f2bb35"), rgb("#f29bb8")
TEAL, BLUE, VIOLET, GREEN = rgb("#23a097"), rgb("#2f6fd0"), rgb("#7b4fb5"), rgb("#2c7d46")
WOOD, DARK, LAMP = rgb("#7a4f2f"), rgb("#3a3a42"), rgb("#ffe08a")

_glass = Paint(LAMP, glow=1.0, snow=False)


def _lighthouse() -> tuple[Shape, ...]:
    return (
        cone(0, 0, 0, 0.22, 0.17, 0.1, Paint(STONE)),
        cone(0, 0.1, 0, 0.145, 0.095, 0.9, Paint(RED, WHITE, bands=5, snow=False)),
        cone(0, 1.0, 0, 0.135, 0.135, 0.035, Paint(DARK)),
        cone(0, 1.035, 0, 0.075, 0.075, 0.13, _glass),
        cone(0, 1.165, 0, 0.12, 0.0, 0.14, Paint(RED)),
    )


def _house() -> tuple[Shape, ...]:
    windows = [box(x, 0.16, z, (0.1, 0.11, 0.02), _glass) for z in (-0.182, 0.182) for x in (-0.15, 0.15)]
    return (
        box(0, 0, 0, (0.52, 0.34, 0.36), Paint(WHITE)),
        gable(0, 0.34, 0, (0.6, 0.25, 0.46), Paint(RED)),
        box(0.15, 0.42, 0.08, (0.08, 0.24, 0.08), Paint(STONE)),
        box(0, 0, 0, (0.1, 0.21, 0.39), Paint(BLUE, snow=False)),
        box(0, 0.15, 0, (0.55, 0.12, 0.11), _glass),
        *windows,
    )


def _windmill() -> tuple[Shape, ...]:
    blades = [
        Polyhedron(
            (reach * math.cos(a), 0.62 + reach * math.sin(a), -0.17),
            tuple(_turned_box(a, (0.36, 0.085, 0.02))),
            0.19,
            0.18,
            Paint(CREAM, snow=False),
        )
        for a in (math.radians(35 + 90 * i) for i in range(4))
        for reach in (0.22,)
    ]
    return (
        cone(0, 0, 0, 0.2, 0.125, 0.6, Paint(WHITE, snow=False)),
        cone(0, 0.6, 0, 0.16, 0.0, 0.17, Paint(BLUE)),
        box(0, 0.595, -0.1, (0.05, 0.05, 0.16), Paint(DARK)),
        box(0, 0, -0.185, (0.1, 0.2, 0.05), Paint(ORANGE, snow=False)),
        *blades,
    )


def _turned_box(angle: float, size: tuple[float, float, float]) -> list[tuple[float, float, float, float]]:
    """Planes of a box turned by ``angle`` in the x-h plane."""
    c, s = math.cos(angle), math.sin(angle)
    w, t, d = (side / 2 for side in size)
    return [(c, s, 0, w), (-c, -s, 0, w), (-s, c, 0, t), (s, -c, 0, t), (0, 0, 1, d), (0, 0, -1, d)]


def _tree(leaves: Colour, size: float) -> tuple[Shape, ...]:
    leaf = Paint(leaves)
    return (
        cone(0, 0, 0, 0.05 * size, 0.035 * size, 0.42 * size, Paint(WOOD)),
        ball(0, 0.58 * size, 0, 0.25 * size, leaf, 0.21 * size),
        ball(0.16 * size, 0.45 * size, 0.08 * size, 0.15 * size, leaf, 0.12 * size),
        ball(-0.15 * size, 0.47 * size, -0.07 * size, 0.16 * size, leaf, 0.13 * size),
    )


def _pine(size: float) -> tuple[Shape, ...]:
    return (
        cone(0, 0, 0, 0.04 * size, 0.04 * size, 0.16 * size, Paint(WOOD)),
        cone(0, 0.14 * size, 0, 0.22 * size, 0.06 * size, 0.3 * size, Paint(GREEN)),
        cone(0, 0.38 * size, 0, 0.165 * size, 0.0, 0.36 * size, Paint(GREEN)),
    )


def _pavilion() -> tuple[Shape, ...]:
    column = Paint(CREAM, snow=False)
    columns = [cone(x, 0.06, z, 0.032, 0.032, 0.36, column) for x in (-0.17, 0.17) for z in (-0.17, 0.17)]
    return (
        cone(0, 0, 0, 0.27, 0.27, 0.06, Paint(STONE)),
        *columns,
        cone(0, 0.42, 0, 0.26, 0.26, 0.05, Paint(CREAM)),
        ball(0, 0.47, 0, 0.22, Paint(TEAL), 0.2),
        cone(0, 0.65, 0, 0.025, 0.0, 0.16, Paint(GOLD)),
    )


def _balloon() -> tuple[Shape, ...]:
    return (
        ball(0, 1.0, 0, 0.29, Paint(ORANGE, VIOLET, panels=8, glow=0.35, snow=False), 0.31),
        cone(0, 0.62, 0, 0.06, 0.16, 0.14, Paint(VIOLET, snow=False)),
        box(0, 0.46, 0, (0.13, 0.1, 0.13), Paint(WOOD)),
    )


def _mushroom() -> tuple[Shape, ...]:
    dots = [
        ball(0.16 * math.cos(a), 0.4, 0.16 * math.sin(a), 0.045, Paint(WHITE))
        for a in (math.radians(60 * i) for i in range(6))
    ]
    return (
        cone(0, 0, 0, 0.09, 0.065, 0.32, Paint(CREAM, snow=False)),
        cone(0, 0.29, 0, 0.25, 0.2, 0.05, Paint(RED)),
        ball(0, 0.34, 0, 0.2, Paint(RED), 0.15),
        ball(0, 0.475, 0, 0.055, Paint(WHITE), 0.03),
        *dots,
    )


def _fountain() -> tuple[Shape, ...]:
    return (
        cone(0, 0, 0, 0.17, 0.17, 0.08, Paint(STONE)),
        cone(0, 0.08, 0, 0.14, 0.14, 0.012, Paint(BLUE, snow=False)),
        cone(0, 0.09, 0, 0.035, 0.025, 0.24, Paint(WHITE)),
        ball(0, 0.38, 0, 0.075, Paint(GOLD, glow=0.25)),
    )


def _post(lintel: bool) -> tuple[Shape, ...]:
    """One of the gate's two posts. ``lintel`` adds the beams, above eye height."""
    beams = (
        box(0.24, 0.66, 0, (0.78, 0.065, 0.07), Paint(RED)),
        box(0.24, 0.53, 0, (0.62, 0.045, 0.05), Paint(RED)),
    )
    return (cone(0, 0, 0, 0.04, 0.034, 0.66, Paint(RED, snow=False)), *(beams if lintel else ()))


def _castle() -> tuple[Shape, ...]:
    return (
        box(0, 0, 0, (0.34, 0.42, 0.34), Paint(STONE), turn=45),
        pyramid(0, 0.42, 0, 0.4, 0.3, Paint(VIOLET), turn=45),
        box(0, 0, 0, (0.37, 0.2, 0.1), Paint(WOOD, snow=False), turn=45),
        box(0, 0.24, 0, (0.355, 0.1, 0.07), _glass, turn=45),
        box(0, 0.24, 0, (0.07, 0.1, 0.355), _glass, turn=45),
    )


LANDMARKS = (
    Landmark(3.3, 0.7, _lighthouse(), 0.5),
    Landmark(0.85, 2.85, _house(), 0.66),
    Landmark(2.75, 2.65, _windmill(), 0.5),
    Landmark(1.95, 1.35, _balloon(), 0.28),
    Landmark(0.9, 1.3, _mushroom(), 0.48),
    Landmark(2.0, 3.4, _castle(), 0.55),
    Landmark(3.2, 1.6, _tree(PINK, 1.2), 0.52),
    Landmark(3.3, 3.45, _tree(ORANGE, 1.0), 0.46),
    Landmark(1.2, 0.25, _pine(1.2), 0.46),
    Landmark(-0.24, 0.5, _post(lintel=True), 0.14),
    Landmark(0.24, 0.5, _post(lintel=False), 0.14),
)


@dataclass(frozen=True, slots=True)
class Look:
    """Colours and light of one time or weather. Directions are (x, h, z), towards the light."""

    name: str
    sun: tuple[float, float, float]
    light: Colour  # of sun or moon, on a surface that faces it
    shade: Colour  # of the sky, on every surface
    zenith: Colour
    horizon: Colour
    haze: Colour  # colour of the fog
    near_hills: Colour
    far_hills: Colour
    cloud: Colour
    cloud_shade: Colour
    disc: Colour
    disc_radius: float  # radians
    halo: float
    glow: float  # factor on the glow of shapes
    stars: float
    snow: float
    grass: Colour
    grass_dark: Colour
    path: Colour
    kerb: Colour
    water: Colour
    shore: Colour
    plaza: Colour
    plaza_dark: Colour


DAY = Look(
    "day",
    sun=(0.55, 0.72, -0.42),
    light=rgb("#7c7460"),
    shade=rgb("#a2a8b2"),
    zenith=rgb("#2f7fdc"),
    horizon=rgb("#a9dcf5"),
    haze=rgb("#c4e4ef"),
    near_hills=rgb("#6fae8c"),
    far_hills=rgb("#8fbcd0"),
    cloud=rgb("#ffffff"),
    cloud_shade=rgb("#dbe9f4"),
    disc=rgb("#fff6cf"),
    disc_radius=0.07,
    halo=0.25,
    glow=0.0,
    stars=0.0,
    snow=0.0,
    grass=rgb("#6fb04a"),
    grass_dark=rgb("#5f9f42"),
    path=rgb("#dcc28a"),
    kerb=rgb("#b89a63"),
    water=rgb("#3b8fd6"),
    shore=rgb("#ecd9a3"),
    plaza=rgb("#cfc6b8"),
    plaza_dark=rgb("#b2a08f"),
)
SUNSET = replace(
    DAY,
    name="sunset",
    sun=(-0.8, 0.24, 0.55),
    light=rgb("#b8683a"),
    shade=rgb("#8a6e88"),
    zenith=rgb("#4b3a86"),
    horizon=rgb("#ff9a5c"),
    haze=rgb("#f2a077"),
    near_hills=rgb("#8a4a78"),
    far_hills=rgb("#c46a7c"),
    cloud=rgb("#ffb08c"),
    cloud_shade=rgb("#d96f7e"),
    disc=rgb("#fff0b0"),
    disc_radius=0.13,
    halo=0.6,
    glow=0.8,
    water=rgb("#d9795f"),
)
NIGHT = replace(
    DAY,
    name="night",
    sun=(-0.45, 0.5, -0.74),
    light=rgb("#2c3c66"),
    shade=rgb("#434e7c"),
    zenith=rgb("#070d2c"),
    horizon=rgb("#27407c"),
    haze=rgb("#1f3266"),
    near_hills=rgb("#101b40"),
    far_hills=rgb("#1a2a5a"),
    cloud=rgb("#2c4078"),
    cloud_shade=rgb("#223366"),
    disc=rgb("#f4f1dc"),
    disc_radius=0.1,
    halo=0.3,
    glow=1.0,
    stars=1.0,
    water=rgb("#3f66b0"),
)
SNOW = replace(
    DAY,
    name="snow",
    sun=(0.6, 0.5, 0.62),
    light=rgb("#5c5650"),
    shade=rgb("#b3bac6"),
    zenith=rgb("#8fa9c6"),
    horizon=rgb("#dfe8f0"),
    haze=rgb("#dde6ee"),
    near_hills=rgb("#c2d0de"),
    far_hills=rgb("#cfdbe7"),
    cloud=rgb("#f4f7fa"),
    cloud_shade=rgb("#d3dde8"),
    disc=rgb("#fffbee"),
    disc_radius=0.07,
    halo=0.2,
    glow=0.6,
    grass=rgb("#ffffff"),
    grass_dark=rgb("#eaf0f7"),
    path=rgb("#c9bba6"),
    kerb=rgb("#aea08f"),
    water=rgb("#9cc6de"),
    shore=rgb("#f2f6fa"),
    plaza=rgb("#d5d3d4"),
    plaza_dark=rgb("#b3afb2"),
    snow=1.0,
)

LOOKS = (DAY, SUNSET, NIGHT, SNOW)
