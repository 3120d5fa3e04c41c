"""Ray intersections with the scene's convex shapes.

All arguments broadcast. Rays and origins are (x, h, z) components; origins are relative to the shape's centre. The
result is a distance, inf where a ray misses or starts inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Components = Sequence[Tensor]

_NEAR = 0.01


def intersect_polyhedron(planes: Sequence[Components], origin: Components, ray: Components) -> Tensor:
    """``planes``: (normal x, h, z, offset) of each. A plane with a zero normal and a positive offset cuts nothing."""
    enter = leave = None
    for nx, nh, nz, offset in planes:
        toward = nx * ray[0] + nh * ray[1] + nz * ray[2]
        inside = offset - (nx * origin[0] + nh * origin[1] + nz * origin[2])
        at = inside / toward
        # A ray parallel to a plane is inside it along its whole length or nowhere.
        entering = torch.where(toward < 0, at, torch.where((toward == 0) & (inside < 0), math.inf, -math.inf))
        leaving = torch.where(toward > 0, at, math.inf)
        enter = entering if enter is None else torch.maximum(enter, entering)
        leave = leaving if leave is None else torch.minimum(leave, leaving)
    assert enter is not None
    assert leave is not None
    return torch.where((enter < leave) & (enter > _NEAR), enter, math.inf)


def intersect_frustum(low: Tensor, high: Tensor, half: Tensor, origin: Components, ray: Components) -> Tensor:
    """A truncated cone: radius ``low`` at h = -half, ``high`` at h = half."""
    slope = (high - low) / (2 * half)
    radius = (low + high) / 2 + slope * origin[1]
    growth = slope * ray[1]
    a = ray[0] ** 2 + ray[2] ** 2 - growth**2
    b = origin[0] * ray[0] + origin[2] * ray[2] - radius * growth
    c = origin[0] ** 2 + origin[2] ** 2 - radius**2
    root = (b * b - a * c).clamp_min(0).sqrt()
    hits = b * b >= a * c
    best = None
    for side in ((-b - root) / a, (-b + root) / a):
        h = origin[1] + side * ray[1]
        good = hits & (h.abs() <= half) & (side > _NEAR) & (radius + growth * side >= 0)
        # The nearer root is an entrance; the farther one is seen only from inside.
        hit = torch.where(good, side, math.inf)
        best = hit if best is None else torch.minimum(best, hit)
    assert best is not None
    for lid, width in ((half, high), (-half, low)):
        at = (lid - origin[1]) / ray[1]
        x, z = origin[0] + at * ray[0], origin[2] + at * ray[2]
        best = torch.minimum(best, torch.where((x * x + z * z <= width**2) & (at > _NEAR), at, math.inf))
    return best


def intersect_ellipsoid(radius: Tensor, half: Tensor, origin: Components, ray: Components) -> Tensor:
    """An ellipsoid of radius ``radius`` and height 2 ``half``."""
    squash = radius / half
    oh, rh = origin[1] * squash, ray[1] * squash
    a = ray[0] ** 2 + rh**2 + ray[2] ** 2
    b = origin[0] * ray[0] + oh * rh + origin[2] * ray[2]
    c = origin[0] ** 2 + oh**2 + origin[2] ** 2 - radius**2
    inside = b * b - a * c
    at = (-b - inside.clamp_min(0).sqrt()) / a
    return torch.where((inside >= 0) & (at > _NEAR), at, math.inf)
