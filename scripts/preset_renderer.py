"""A small rasteriser in numpy for scripts/make_presets.py: flat triangles, shadows, fog, water that mirrors.

Axes: x right, y up, z forward; units are metres; colours are linear light.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageFilter

SIZE = (840, 504)  # 5:3; wider and narrower worlds crop a little of it
SUPERSAMPLE = 2


def rgb(text: str) -> np.ndarray:
    """ "#rrggbb" -> linear light."""
    return (np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255) ** 2.2


@dataclass
class Look:
    """Light and air."""

    sun: tuple[float, float, float]
    sun_color: np.ndarray
    sky_top: np.ndarray
    sky_low: np.ndarray
    ambient: np.ndarray
    fog: float  # share of the air's colour after 100 m
    disc: np.ndarray | None = None  # sun or moon
    stars: int = 0
    exposure: float = 1.0
    clouds: float = 0.0
    water: np.ndarray = field(default_factory=lambda: rgb("#2b5d70"))


class Mesh:
    """Triangles with one colour each; `glow` is light of their own."""

    def __init__(self) -> None:
        self.triangles: list[np.ndarray] = []
        self.colors: list[np.ndarray] = []
        self.glows: list[np.ndarray] = []

    def add(self, triangles: np.ndarray, color: np.ndarray, glow: float = 0.0) -> None:
        color = np.broadcast_to(color, (len(triangles), 3))
        self.triangles.append(triangles)
        self.colors.append(color)
        self.glows.append(color * glow)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.concatenate(self.triangles), np.concatenate(self.colors), np.concatenate(self.glows)


def noise(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Smooth value noise, one cell a unit, -1..1."""
    table = np.random.default_rng(seed).uniform(-1, 1, (64, 64))
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - x0, y - y0
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)

    def at(dx: int, dy: int) -> np.ndarray:
        return table[(x0 + dx) % 64, (y0 + dy) % 64]

    return (at(0, 0) * (1 - u) + at(1, 0) * u) * (1 - v) + (at(0, 1) * (1 - u) + at(1, 1) * u) * v


def fractal(x: np.ndarray, y: np.ndarray, seed: int, octaves: int = 4) -> np.ndarray:
    return sum(noise(x * 2**o, y * 2**o, seed + o) / 2**o for o in range(octaves))


def terrain(mesh: Mesh, height, color, x: tuple[float, float], z: tuple[float, float], cells: tuple[int, int]) -> None:
    """A grid of triangles over ``height(x, z)``, its corners shaken; ``color(centre, normal)`` a triangle."""
    rng = np.random.default_rng(5)
    # Cells grow with the distance.
    depth = np.linspace(0, 1, cells[1] + 1) ** 1.8
    gx, gz = np.meshgrid(np.linspace(*x, cells[0] + 1), z[0] + (z[1] - z[0]) * depth, indexing="ij")
    gx = gx * (0.12 + 0.88 * (gz - z[0]) / (z[1] - z[0]))
    gx = gx + rng.uniform(-0.3, 0.3, gx.shape) * np.gradient(gx, axis=0)
    gz = gz + rng.uniform(-0.3, 0.3, gz.shape) * np.gradient(gz, axis=1)
    p = np.stack([gx, height(gx, gz), gz], -1)
    a, b, c, d = p[:-1, :-1], p[1:, :-1], p[1:, 1:], p[:-1, 1:]
    triangles = np.concatenate([np.stack([a, c, b], -2).reshape(-1, 3, 3), np.stack([a, d, c], -2).reshape(-1, 3, 3)])
    mesh.add(triangles, color(triangles.mean(1), normals(triangles)))


def normals(triangles: np.ndarray) -> np.ndarray:
    n = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    n /= np.linalg.norm(n, axis=1, keepdims=True) + 1e-9
    return n


def ring(radius: float, y: float, sides: int, turn: float) -> np.ndarray:
    angle = turn + 2 * np.pi * np.arange(sides + 1) / sides
    return np.stack([radius * np.cos(angle), np.full(sides + 1, y), radius * np.sin(angle)], -1)


def frustum(
    mesh: Mesh,
    at,
    low: float,
    high: float,
    y: tuple[float, float],
    color,
    sides: int = 7,
    glow: float = 0.0,
    turn: float = 0.0,
) -> None:
    """A cone or a cylinder standing at ``at``, with a lid."""
    a, b = ring(low, y[0], sides, turn) + at, ring(high, y[1], sides, turn) + at
    top = np.broadcast_to(np.array([0, y[1], 0]) + at, (sides, 3))
    faces = [
        np.stack([a[:-1], b[:-1], b[1:]], 1),
        np.stack([a[:-1], b[1:], a[1:]], 1),
        np.stack([top, b[1:], b[:-1]], 1),
    ]
    mesh.add(np.concatenate(faces), color, glow)


def box(mesh: Mesh, low, high, color, glow: float = 0.0) -> None:
    (x0, y0, z0), (x1, y1, z1) = low, high
    v = np.array([[x, y, z] for x in (x0, x1) for y in (y0, y1) for z in (z0, z1)], float)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    mesh.add(np.array([[v[q[0]], v[q[i]], v[q[i + 1]]] for q in quads for i in (1, 2)]), color, glow)


def roof(mesh: Mesh, low, high, ridge: float, color) -> None:
    """Two slopes with the ridge along z, and the gables."""
    (x0, y, z0), (x1, _, z1) = low, high
    m = (x0 + x1) / 2
    a, b, c, d = (x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)
    e, f = (m, ridge, z0), (m, ridge, z1)
    mesh.add(np.array([[a, e, f], [a, f, d], [b, f, e], [b, c, f], [a, b, e], [d, f, c]], float), color)


def pine(mesh: Mesh, at, size: float, color, rng, snow: float = 0.0) -> None:
    frustum(mesh, at, 0.12 * size, 0.1 * size, (0, 0.5 * size), rgb("#4a3526"), 5)
    shade = color * rng.uniform(0.75, 1.2)
    for i, (radius, low, high) in enumerate([(0.62, 0.35, 1.15), (0.5, 0.8, 1.6), (0.36, 1.25, 2.1)]):
        layer = shade * (0.85 + 0.15 * i)
        layer = layer * (1 - snow) + rgb("#eef3f8") * snow * (0.75 + 0.12 * i)
        frustum(mesh, at, radius * size, 0.02, (low * size, high * size), layer, 7, turn=rng.uniform(0, 6))


def broadleaf(mesh: Mesh, at, size: float, color, rng) -> None:
    frustum(mesh, at, 0.13 * size, 0.09 * size, (0, 1.0 * size), rgb("#4a3526"), 5)
    for _ in range(3):
        offset = np.array(at) + size * np.array(
            [rng.uniform(-0.35, 0.35), rng.uniform(0.9, 1.35), rng.uniform(-0.3, 0.3)]
        )
        blob(mesh, offset, size * rng.uniform(0.42, 0.62), color * rng.uniform(0.8, 1.2), rng)


def blob(mesh: Mesh, at, radius: float, color, rng, glow: float = 0.0) -> None:
    """A rough ball."""
    rings = [
        ring(radius * np.sin(t), radius * np.cos(t), 8, 0.4 * i)
        for i, t in enumerate(np.linspace(0.02, np.pi - 0.02, 6))
    ]
    p = np.stack(rings) * rng.uniform(0.92, 1.08, (6, 1, 1)) + at
    a, b, c, d = p[:-1, :-1], p[:-1, 1:], p[1:, 1:], p[1:, :-1]
    mesh.add(
        np.concatenate([np.stack([a, b, c], -2).reshape(-1, 3, 3), np.stack([a, c, d], -2).reshape(-1, 3, 3)]),
        color,
        glow,
    )


# --- rasteriser ---


def rasterise(points: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """points [n, 3, 3] = pixel x, pixel y, 1/depth (larger is nearer) -> (triangle index or -1, 1/depth)."""
    index = np.full((height, width), -1, np.int32)
    near = np.zeros((height, width))
    low, high = points[..., :2].min(1), points[..., :2].max(1)
    for i in np.flatnonzero((high[:, 0] > 0) & (low[:, 0] < width) & (high[:, 1] > 0) & (low[:, 1] < height)):
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = points[i]
        x0, y0 = max(int(low[i, 0]), 0), max(int(low[i, 1]), 0)
        x1, y1 = min(int(high[i, 0]) + 2, width), min(int(high[i, 1]) + 2, height)
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(area) < 1e-6 or x0 >= x1 or y0 >= y1:
            continue
        x, y = np.arange(x0, x1) + 0.5, (np.arange(y0, y1) + 0.5)[:, None]
        u = ((bx - x) * (cy - y) - (by - y) * (cx - x)) / area
        v = ((cx - x) * (ay - y) - (cy - y) * (ax - x)) / area
        w = 1 - u - v
        z = u * az + v * bz + w * cz
        inside = (u >= 0) & (v >= 0) & (w >= 0) & (z > near[y0:y1, x0:x1])
        index[y0:y1, x0:x1][inside] = i
        near[y0:y1, x0:x1][inside] = z[inside]
    return index, near


@dataclass
class Camera:
    at: tuple[float, float, float]
    pitch: float = 0.0  # degrees, up is positive
    focal: float = 0.95  # of the picture's width

    def rays(self, width: int, height: int) -> np.ndarray:
        x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, height / 2 - np.arange(height) - 0.5)
        d = np.stack([x, y, np.full_like(x, self.focal * width)], -1) @ self._turn().T
        return d / np.linalg.norm(d, axis=-1, keepdims=True)

    def project(self, triangles: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (points for ``rasterise``, which triangles lie wholly before the camera)."""
        p = (triangles - np.array(self.at)) @ self._turn()
        seen = (p[..., 2] > 0.15).all(1)
        z = np.maximum(p[..., 2], 0.15)
        f = self.focal * width
        return np.stack([width / 2 + f * p[..., 0] / z, height / 2 - f * p[..., 1] / z, 1 / z], -1), seen

    @property
    def forward(self) -> np.ndarray:
        return self._turn()[:, 2]

    def _turn(self) -> np.ndarray:
        c, s = np.cos(np.radians(self.pitch)), np.sin(np.radians(self.pitch))
        return np.array([[1, 0, 0], [0, c, s], [0, -s, c]])


def sky(look: Look, rays: np.ndarray) -> np.ndarray:
    up = np.clip(rays[..., 1:2], 0, 1)
    color = look.sky_low + (look.sky_top - look.sky_low) * up**0.55
    sun = np.array(look.sun) / np.linalg.norm(look.sun)
    facing = np.clip((rays @ sun)[..., None], 0, 1)
    color = color + look.sun_color * (0.10 * facing**8 + 0.16 * facing**60)
    if look.clouds:
        flat = rays[..., [0, 2]] / (rays[..., 1:2] + 0.12)
        cover = fractal(flat[..., 0] * 0.9 + 7, flat[..., 1] * 0.45, 31, 5)[..., None]
        cover = np.clip(cover * 1.5 - 0.15, 0, 1) * np.clip(up * 7, 0, 1) * look.clouds
        lit = 0.6 * look.sky_low + 0.22 * look.sun_color + 0.25 * look.ambient
        color = color + (lit - color) * cover
    if look.stars:
        rng = np.random.default_rng(3)
        for _ in range(look.stars):
            row, column = rng.integers(0, int(rays.shape[0] * 0.62)), rng.integers(0, rays.shape[1])
            color[row : row + 2, column : column + 2] += rng.uniform(0.05, 0.6)
    if look.disc is not None:
        color = np.where(facing > 0.99925, look.disc, color)
    return color


class Renderer:
    def __init__(self, mesh: Mesh, look: Look, camera: Camera) -> None:
        self.look, self.camera = look, camera
        self.width, self.height = SIZE[0] * SUPERSAMPLE, SIZE[1] * SUPERSAMPLE
        self.triangles, self.colors, self.glows = mesh.arrays()
        self.sun = np.array(look.sun) / np.linalg.norm(look.sun)
        self._make_shadow_map()

    def _make_shadow_map(self, size: int = 1500, reach: float = 46.0) -> None:
        side = np.cross([0.0, 1.0, 0.0], self.sun)
        side /= np.linalg.norm(side)
        self.basis = np.stack([side, np.cross(self.sun, side), self.sun])
        self.shadow_scale, self.shadow_size = size / (2 * reach), size
        self.shadow_centre = np.array([self.camera.at[0], 0, self.camera.at[2] + reach * 0.8])
        _, self.shadow = rasterise(self._to_sun(self.triangles), size, size)

    def _to_sun(self, points: np.ndarray) -> np.ndarray:
        p = (points - self.shadow_centre) @ self.basis.T
        xy = p[..., :2] * self.shadow_scale + self.shadow_size / 2
        return np.concatenate([xy, p[..., 2:] + 500], -1)  # nearer to the sun is larger

    def _lit(self, points: np.ndarray) -> np.ndarray:
        """Share of the sun that reaches each point, soft over a few texels."""
        p = self._to_sun(points)
        total = np.zeros(len(points))
        taps = [(-1.5, -0.5), (0.5, -1.5), (1.5, 0.5), (-0.5, 1.5), (0, 0)]
        for dx, dy in taps:
            x = np.clip((p[:, 0] + dx).astype(int), 0, self.shadow_size - 1)
            y = np.clip((p[:, 1] + dy).astype(int), 0, self.shadow_size - 1)
            total += self.shadow[y, x] <= p[:, 2] + 0.18
        return total / len(taps)

    def render(self, water_level: float | None = None, wet: float = 0.0, ripple: float = 0.05) -> np.ndarray:
        """Linear light [H, W, 3]. Below ``water_level`` lies water; ``wet`` > 0: a wet ground that mirrors in part."""
        rays = self.camera.rays(self.width, self.height)
        color, depth = self._view(self.triangles, rays)
        if water_level is None:
            return color
        eye = np.array(self.camera.at)
        distance = np.where(rays[..., 1] < -1e-4, (water_level - eye[1]) / np.minimum(rays[..., 1], -1e-4), np.inf)
        # Wet ground lies in the surface itself, water covers what is under it.
        on_water = distance < depth + (0.02 * distance + 0.05 if wet else 0)
        mirrored = self.triangles * [1, -1, 1] + [0, 2 * water_level, 0]
        above = mirrored[..., 1].min(1) < water_level - 0.01
        flipped = rays * [1, -1, 1]
        image, _ = self._view(mirrored, rays, keep=above, mirror=water_level)
        at = eye + rays * np.where(np.isfinite(distance), distance, 0)[..., None]
        near = np.clip(18 / np.where(np.isfinite(distance), distance, 1e9), 0, 1.6)
        shift = ripple * near * fractal(at[..., 0] * 2.2, at[..., 2] * 4.5, 77, 3)
        rows, columns = np.indices(shift.shape)
        rows = np.clip(rows + (shift * self.height * 0.35).astype(int), 0, self.height - 1)
        columns = np.clip(columns + (shift * self.width * 0.06).astype(int), 0, self.width - 1)
        image = image[rows, columns]
        grazing = np.clip(1 + rays[..., 1:2], 0, 1) ** 4
        if wet:
            puddle = np.clip(fractal(at[..., 0] * 0.8, at[..., 2] * 0.5, 12, 3)[..., None] * 0.9 + 0.55, 0.15, 1)
            mixed = color * (1 - 0.55 * wet * puddle) + image * wet * puddle * grazing
        else:
            glint = self.look.sun_color * np.clip((flipped @ self.sun)[..., None] + shift[..., None] * 0.9, 0, 1) ** 220
            mixed = self.look.water * 0.35 * (1 - grazing) + image * (0.18 + 0.74 * grazing) + 0.7 * glint
            mixed = self._air(mixed, np.where(np.isfinite(distance), distance, 0), flipped)
        return np.where(on_water[..., None], mixed, color)

    def _view(
        self, triangles: np.ndarray, rays: np.ndarray, keep: np.ndarray | None = None, mirror: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """-> (linear light, distance). ``triangles``: the scene's own, or those mirrored in the height ``mirror``."""
        points, seen = self.camera.project(triangles, self.width, self.height)
        chosen = np.flatnonzero(seen if keep is None else seen & keep)
        index, near = rasterise(points[chosen], self.width, self.height)
        eye, flip = np.array(self.camera.at), np.array([1.0, 1.0, 1.0])
        hit = index >= 0
        which = chosen[index[hit]]
        distance = 1 / near[hit] / (rays[hit] @ self.camera.forward)
        at = eye + rays[hit] * distance[:, None]
        if mirror is not None:  # light falls on the world above, seen by an eye below
            flip = np.array([1.0, -1.0, 1.0])
            at, eye = at * flip + [0, 2 * mirror, 0], eye * flip + [0, 2 * mirror, 0]
        color = sky(self.look, rays * flip)
        n = normals(self.triangles)[which]
        n = np.where((n * (at - eye)).sum(1, keepdims=True) > 0, -n, n)
        direct = np.clip(n @ self.sun, 0, 1) * self._lit(at + n * 0.06)
        soft = 0.55 + 0.45 * n[:, 1]
        light = direct[:, None] * self.look.sun_color + soft[:, None] * self.look.ambient
        color[hit] = self._air(self.colors[which] * light + self.glows[which], distance, rays[hit] * flip)
        depth = np.full(hit.shape, np.inf)
        depth[hit] = distance
        return color, depth

    def _air(self, color: np.ndarray, distance: np.ndarray, rays: np.ndarray) -> np.ndarray:
        share = 1 - (1 - self.look.fog) ** (distance / 100)
        air = sky(replace(self.look, disc=None, stars=0, clouds=0.0), rays * [1, 0.25, 1])
        return color + (air - color) * share[..., None]


def develop(linear: np.ndarray, exposure: float, rain: float = 0.0, snow: int = 0) -> Image.Image:
    """Glow, film curve, fewer pixels."""
    rng = np.random.default_rng(9)
    linear = np.clip(linear * exposure, 0, 40)
    bright = np.clip(linear - 0.9, 0, 6)
    for radius, share in ((6, 0.35), (26, 0.3)):
        glow = Image.fromarray((bright * (255 / 6)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
        linear = linear + share * np.asarray(glow, float) * (6 / 255)
    curve = (linear * (2.51 * linear + 0.03)) / (linear * (2.43 * linear + 0.59) + 0.14)
    picture = np.clip(curve, 0, 1) ** (1 / 2.2)
    height, width = picture.shape[:2]
    if rain:
        veil = np.zeros((height, width), np.float32)
        for _ in range(1100):
            x, y, length = rng.integers(0, width), rng.integers(-60, height), rng.integers(14, 60)
            veil[max(y, 0) : max(y + length, 0), x : x + 2] += rng.uniform(0.02, 0.09)
        picture = picture + rain * veil[..., None]
    if snow:
        veil = Image.new("L", (width, height))
        for _ in range(snow):
            x, y, r = rng.integers(0, width), rng.integers(0, height), rng.uniform(0.8, 3.6)
            veil.paste(int(90 + 40 * r), (int(x), int(y), int(x + r + 1), int(y + r + 1)))
        veil = np.asarray(veil.filter(ImageFilter.GaussianBlur(1.2)), float) / 255
        picture = picture + veil[..., None] * 0.75
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    picture = picture * (1 - 0.16 * np.clip(x**2 * 0.6 + y**2 * 0.5 - 0.25, 0, 1))[..., None]
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return image.resize(SIZE, Image.Resampling.LANCZOS)
