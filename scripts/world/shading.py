"""Colours of sky, ground and surfaces: flat areas with sharp edges.

F frames, R rays per frame; directions and normals in the scene's axes (x, h up, z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from scripts.world.scene import PERIOD, Look, Paint

_TONES = 4  # brightness levels of a lit surface
_STARS = 90

_CLOUDS = (
    # azimuth, height of the flat foot, width, height, in radians
    (0.3, 0.30, 0.42, 0.17),
    (1.25, 0.42, 0.30, 0.12),
    (2.2, 0.28, 0.50, 0.18),
    (3.1, 0.46, 0.34, 0.14),
    (4.0, 0.31, 0.40, 0.16),
    (4.9, 0.40, 0.36, 0.13),
    (5.75, 0.52, 0.30, 0.12),
)
_PEAKS = (
    # azimuth, height, half width at the foot, in radians
    (0.55, 0.30, 0.42),
    (1.05, 0.21, 0.30),
    (2.75, 0.26, 0.75),
    (4.3, 0.34, 0.34),
    (5.35, 0.19, 0.28),
    (5.75, 0.24, 0.34),
)
"""Mountains at the horizon. No two are alike, so that one in view tells the direction."""

_SNOW_LINE = 0.62
"""Share of a mountain's height from which it is white."""

_PUFFS = ((0.0, 1.0, 0.52), (-0.52, 0.62, 0.38), (0.5, 0.72, 0.42))
"""The ellipses of a cloud: offset along its width, height, half-width, as shares of the cloud's."""


def smoothstep(x: Tensor) -> Tensor:
    """3 x^2 - 2 x^3, with x clamped to [0, 1]."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


@dataclass(frozen=True)
class LookTables:
    """The fields of Look as tensors: ``of`` stacks all looks, ``at`` selects one per frame, [F, 1, 3] or [F, 1, 1]."""

    values: dict[str, Tensor]

    @classmethod
    def of(cls, looks: Sequence[Look], device: torch.device) -> LookTables:
        values = {}
        for field in fields(Look):
            if field.name != "name":
                rows = torch.tensor([getattr(look, field.name) for look in looks], dtype=torch.float32, device=device)
                values[field.name] = rows.view(len(looks), 1, -1)
        values["sun"] = torch.nn.functional.normalize(values["sun"], dim=-1)
        generator = torch.Generator().manual_seed(4)
        stars = torch.randn(_STARS, 3, generator=generator).abs_()
        stars[:, (0, 2)] *= torch.randint(0, 2, (_STARS, 2), generator=generator) * 2 - 1
        values["star"] = torch.nn.functional.normalize(stars, dim=-1).T.to(device)
        return cls(values)

    def at(self, look_F: Tensor) -> LookTables:
        return LookTables({name: rows if name == "star" else rows[look_F] for name, rows in self.values.items()})

    def __getattr__(self, name: str) -> Tensor:
        return self.values[name]


@dataclass(frozen=True)
class PaintTables:
    """The fields of Paint as tensors with one row per shape; ``at`` selects rows."""

    colour: Tensor
    second: Tensor
    bands: Tensor
    panels: Tensor
    glow: Tensor
    snow: Tensor

    @classmethod
    def of(cls, paints: Sequence[Paint], device: torch.device) -> PaintTables:
        def rows(values: list) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return cls(
            rows([paint.colour for paint in paints]),
            rows([paint.second or paint.colour for paint in paints]),
            *(rows([float(getattr(paint, name)) for paint in paints]) for name in ("bands", "panels", "glow", "snow")),
        )

    def at(self, shape: Tensor) -> PaintTables:
        return PaintTables(*(getattr(self, field.name)[shape] for field in fields(self)))


def sky_colour(ray_FR3: Tensor, look: LookTables) -> Tensor:
    """Sky gradient, sun or moon, stars, clouds with flat bases and two rows of hills, for rays above the horizon."""
    up = ray_FR3[..., 1:2].clamp(0, 1)
    azimuth = torch.atan2(ray_FR3[..., 0:1], ray_FR3[..., 2:3])
    height = torch.asin(up)
    colour = look.horizon + (look.zenith - look.horizon) * (up.clamp_min(1e-6) ** 0.7)
    facing = (ray_FR3 * look.sun).sum(-1, keepdim=True).clamp(0, 1)
    colour = colour + look.disc * look.halo * (facing**14 * 0.4 + facing**90 * 0.5)
    star = (ray_FR3 @ look.star).amax(-1, keepdim=True)
    colour = torch.where((star > math.cos(0.009)) & (look.stars > 0), 0.95 * torch.ones_like(colour), colour)
    colour = torch.where(facing > torch.cos(look.disc_radius), look.disc, colour)
    # Clouds do not overlap in azimuth, so each ray tests only the nearest one.
    clouds = ray_FR3.new_tensor(_CLOUDS)
    from_cloud = torch.remainder(azimuth - clouds[:, 0] + math.pi, 2 * math.pi) - math.pi
    which = from_cloud.abs().argmin(-1)
    _, foot, width, rise = clouds[which][..., None, :].unbind(-1)
    from_cloud = from_cloud.gather(-1, which[..., None])
    inside = torch.zeros_like(up, dtype=torch.bool)
    for along, tall, half in _PUFFS:
        across = from_cloud - along * width / 2
        inside |= (across / (half * width)) ** 2 + ((height - foot) / (tall * rise)) ** 2 < 1
    tone = torch.where(height < foot + 0.28 * rise, look.cloud_shade, look.cloud)
    colour = torch.where(inside & (height > foot), tone, colour)
    peaks = ray_FR3.new_tensor(_PEAKS)
    from_peak = (torch.remainder(azimuth - peaks[:, 0] + math.pi, 2 * math.pi) - math.pi).abs()
    slope, which = (peaks[:, 1] * (1 - from_peak / peaks[:, 2])).max(-1, keepdim=True)
    white = height > _SNOW_LINE * peaks[which[..., 0]][..., 1:2]
    colour = torch.where(height < slope, torch.where(white, look.cloud, look.far_hills), colour)
    near = 0.075 + 0.035 * torch.sin(2 * azimuth + 2.0)
    colour = torch.where(height < near, look.near_hills, colour)
    return look.haze + (colour - look.haze) * smoothstep(height / 0.05)


def ground_colour(at_FR2: Tensor, shade_FR: Tensor, look: LookTables) -> Tensor:
    """The ground at positions (x, z) of the torus: lawn in two greens, two winding paths, a plaza and a pond."""
    x, z = at_FR2[..., 0:1], at_FR2[..., 1:2]
    turn = 2 * math.pi / PERIOD

    def from_middle(value: Tensor) -> Tensor:
        return (torch.remainder(value + PERIOD / 2, PERIOD) - PERIOD / 2).abs()

    checks = (torch.floor(x * 1.5) + torch.floor(z * 1.5)) % 2
    colour = torch.where(checks < 0.5, look.grass, look.grass_dark)
    # Both paths wind with the period of the torus, so they close.
    along = torch.minimum(from_middle(x - 0.1 * torch.sin(turn * z)), from_middle(z - 2 - 0.08 * torch.sin(turn * x)))
    colour = torch.where(along < 0.125, look.kerb, colour)
    colour = torch.where(along < 0.1, look.path, colour)
    pond = torch.sqrt((from_middle(x - 2.5) / 1.25) ** 2 + from_middle(z - 0.6) ** 2)
    colour = torch.where(pond < 0.46, look.shore, colour)
    colour = torch.where(pond < 0.4, look.water, colour)
    plaza = torch.sqrt(from_middle(x) ** 2 + from_middle(z - 2) ** 2)
    colour = torch.where(plaza < 0.5, look.plaza_dark, colour)
    colour = torch.where(plaza < 0.44, look.plaza, colour)
    colour = torch.where(plaza < 0.3, look.plaza_dark, colour)
    lit = look.sun[..., 1:2] * (1 - shade_FR[..., None])
    # The constant part keeps the ground from being dark in looks with a low sun.
    return colour * (look.shade * 1.05 + look.light * (0.35 * (1 - shade_FR[..., None]) + 0.55 * lit))


def surface_colour(at_FR3: Tensor, normal_FR3: Tensor, half_FR: Tensor, paint: PaintTables, look: LookTables) -> Tensor:
    """Points of shapes, relative to their centres: two colours in bands or panels, few brightness levels, snow."""
    x, h, z = at_FR3.unbind(-1)
    level = ((h / half_FR + 1) / 2).clamp(0, 1 - 1e-5)
    band = torch.floor(level * paint.bands) % 2
    panel = torch.floor((torch.atan2(x, z) / (2 * math.pi) + 0.5) * paint.panels) % 2
    colour = torch.where(((band + panel) % 2 > 0.5)[..., None], paint.second, paint.colour)
    snow = (look.snow > 0) & (paint.snow > 0)[..., None] & (normal_FR3[..., 1:2] > 0.3)
    colour = torch.where(snow, torch.ones_like(colour), colour)
    lit = (normal_FR3 * look.sun).sum(-1, keepdim=True).clamp(0, 1)
    lit = torch.ceil(lit * _TONES) / _TONES
    from_sky = 0.82 + 0.18 * torch.round(normal_FR3[..., 1:2] * 2) / 2
    colour_lit = colour * (look.shade * from_sky + look.light * lit)
    glow = paint.glow[..., None] * look.glow
    return colour_lit + (colour - colour_lit) * glow
