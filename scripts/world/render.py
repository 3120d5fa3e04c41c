"""Renders the true world by analytic ray casting: camera poses to pictures, deterministically.

Shapes: F frames, R rays per frame, I instances (every shape in its nine nearest copies of the torus), L landmarks.
Rays use the scene's axes (x right, h up, z forward) with the origin on the ground under the camera. Poses use the
camera's axes (x right, y down, z forward), c2w [4, 4].

On a CPU each instance is tested only in the rectangle of the picture that its bounding sphere covers. On an
accelerator, and in small pictures, all rays are tested against the nearest instances at once, in kernels that
torch.compile fuses.
Both use the same intersections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lingbot_rt.shapes import FrameSize
from scripts.world.intersect import Components, intersect_ellipsoid, intersect_frustum, intersect_polyhedron
from scripts.world.scene import LANDMARKS, LOOKS, PERIOD, Ellipsoid, Frustum, Polyhedron, Shape
from scripts.world.shading import LookTables, PaintTables, ground_colour, sky_colour, smoothstep, surface_colour

FOCAL_OF_WIDTH = 500 / 832
"""Focal length divided by width: 500 pixels at 832x480, a horizontal view of 80 degrees."""

FAR = 3.0
"""The fog hides everything beyond. Within this distance nine copies of the torus suffice."""

_FOG_FROM = 1.0
_TEXELS = 768  # side of a shadow map
_SHADOWS: dict[torch.device, Tensor] = {}  # [looks, texels, texels]; the world never changes
_LOWEST_SUN = 0.42  # least height of the sun for shadows: longer ones would cover everything
_KINDS = (Polyhedron, Frustum, Ellipsoid)
_MAX_INSTANCES = {Polyhedron: 32, Frustum: 24, Ellipsoid: 20}
"""The nearest instances per kind that an accelerator tests; 21,600 views had at most 26, 17 and 16 of them."""
_BATCH_FRAMES = 64  # frames rendered at once on an accelerator
_FEW_RAYS = 4096  # rays per frame up to which a CPU is faster with all at once


class Renderer:
    """Renders pictures of one size on one device."""

    def __init__(self, size: FrameSize, device: torch.device | str = "cpu", supersample: int = 2) -> None:
        self.size, self.device, self._supersample = size, torch.device(device), supersample
        owned = [(shape, i) for i, landmark in enumerate(LANDMARKS) for shape in landmark.shapes]
        owned = [entry for kind in _KINDS for entry in owned if isinstance(entry[0], kind)]
        self._kinds = [type(shape) for shape, _ in owned]

        def table(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        self._owner = torch.tensor([i for _, i in owned], device=self.device)
        self._centre = table([shape.centre for shape, _ in owned])
        self._half = table([shape.half_height for shape, _ in owned])
        self._low = table([_radii(shape)[0] for shape, _ in owned])
        self._high = table([_radii(shape)[1] for shape, _ in owned])
        self._planes = table([_six_planes(shape) for shape, _ in owned])
        self._bounding_radius = table([_bounding_radius(shape) for shape, _ in owned]).repeat_interleave(9)
        self._site = table([(landmark.x, landmark.z) for landmark in LANDMARKS])
        self._sink_radius = table([landmark.sink_radius for landmark in LANDMARKS])
        self._height = table([landmark.height for landmark in LANDMARKS])
        self._paint = PaintTables.of([shape.paint for shape, _ in owned], self.device)
        self._look = LookTables.of(LOOKS, self.device)
        self._view = self._camera_rays()
        if self.device not in _SHADOWS:
            _SHADOWS[self.device] = torch.stack([self._cast_shadows(look.sun) for look in LOOKS])
        self._shadow = _SHADOWS[self.device]
        self._render: Callable[[Tensor, Tensor], Tensor] = self._render_all
        self._compiled = self.device.type == "cuda"
        if self._compiled:
            self._render = torch.compile(self._render_all, dynamic=False)

    @torch.no_grad()
    def render(self, poses: npt.NDArray[np.float64] | Tensor, looks: Sequence[int] | Tensor) -> Tensor:
        """World poses [F, 4, 4] and the look of each frame (an index into LOOKS) -> uint8 [F, H, W, 3].

        ``looks`` [F, K] gives every frame in K looks, [F, K, H, W, 3]. What each ray hits is computed once for them.
        """
        pose_F44 = torch.as_tensor(poses).to(self.device, torch.float32)
        look = torch.as_tensor(looks, device=self.device)
        look_FK = look.reshape(len(look), -1)
        batch = _BATCH_FRAMES if self._compiled else 8 if self._view.shape[:2].numel() <= _FEW_RAYS else 1
        render = self._render_one if batch == 1 else self._render
        # The last batch is padded: with one shape everything compiles once.
        frames = torch.arange(-(-len(pose_F44) // batch) * batch, device=self.device)
        parts = [render(pose_F44[some], look_FK[some]) for some in frames.clamp(max=len(pose_F44) - 1).split(batch)]
        pictures = torch.cat(parts)[: len(pose_F44)]
        return pictures if look.ndim == 2 else pictures[:, 0]

    def coarse(self) -> Renderer:
        """A renderer of half the width and height and one sample per pixel, for searches."""
        return Renderer(FrameSize(self.size.width // 2, self.size.height // 2), self.device, supersample=1)

    # --- nearest hits: instance by instance, or all at once ---

    def _render_one(self, pose_F44: Tensor, look_FK: Tensor) -> Tensor:
        """One frame, instance by instance, each in the rectangle of its bounding sphere."""
        rotation, eye = pose_F44[0, :3, :3], _eye(pose_F44)[0]
        ray_HW3 = self._view @ rotation.T * self._view.new_tensor([1, -1, 1])
        height, width, _ = ray_HW3.shape
        centre_FI3, raised_FL = self._positions(pose_F44)
        seen, _ = self._in_view(pose_F44, centre_FI3)
        hit = torch.full((height, width), math.inf)
        instance = torch.zeros(height, width, dtype=torch.long)
        in_camera = ((centre_FI3[0] - eye) * eye.new_tensor([1, -1, 1])) @ rotation
        for i in seen[0].nonzero()[:, 0].tolist():
            part = self._screen_rect(in_camera[i].tolist(), self._bounding_radius[i].item())
            if any(side.start >= side.stop for side in part):
                continue
            ray, origin = ray_HW3[part].unbind(-1), (eye - centre_FI3[0, i]).unbind(-1)
            found = self._intersect(self._kinds[i // 9], torch.tensor(i // 9), origin, ray)
            nearer = found < hit[part]
            hit[part] = torch.where(nearer, found, hit[part])
            instance[part] = torch.where(nearer, i, instance[part])
        flat = (ray_HW3.view(1, -1, 3), hit.view(1, -1), instance.view(1, -1))
        return self._colours(*flat, centre_FI3, raised_FL, pose_F44, look_FK)

    def _render_all(self, pose_F44: Tensor, look_FK: Tensor) -> Tensor:
        """All frames at once, with the nearest instances in view of each kind of shape."""
        ray_FR3 = torch.einsum("fij,rj->fri", pose_F44[:, :3, :3], self._view.view(-1, 3))
        ray_FR3 = ray_FR3 * ray_FR3.new_tensor([1, -1, 1])
        eye_F3 = _eye(pose_F44)
        centre_FI3, raised_FL = self._positions(pose_F44)
        seen, distance = self._in_view(pose_F44, centre_FI3)
        order = torch.where(seen, distance, math.inf)
        hit = torch.full(ray_FR3.shape[:2], math.inf, device=self.device)
        instance = torch.zeros(ray_FR3.shape[:2], dtype=torch.long, device=self.device)
        for kind in _KINDS:
            first, count = 9 * self._kinds.index(kind), 9 * self._kinds.count(kind)
            span = order[:, first : first + count]
            # Compiled code needs a fixed number; elsewhere it is the most that a frame needs.
            most = min(_MAX_INSTANCES[kind], count) if self._compiled else max(1, int(span.isfinite().sum(dim=1).max()))
            nearest = span.topk(most, dim=1, largest=False)
            index = nearest.indices + first
            centre = centre_FI3.gather(1, index[..., None].expand(-1, -1, 3))
            # An instance out of view is moved far away, where no ray hits it.
            centre = torch.where(nearest.values.isinf()[..., None], 1e6, centre)
            origin = (eye_F3[:, None] - centre)[:, :, None].unbind(-1)
            found_FKR = self._intersect(kind, index[..., None] // 9, origin, ray_FR3[:, None].unbind(-1))
            found, which = found_FKR.min(dim=1)
            instance = torch.where(found < hit, index.gather(1, which), instance)
            hit = torch.minimum(hit, found)
        return self._colours(ray_FR3, hit, instance, centre_FI3, raised_FL, pose_F44, look_FK)

    def _intersect(self, kind: type, shape: Tensor, origin: Components, ray: Components) -> Tensor:
        if kind is Polyhedron:
            planes = self._planes[shape]
            return intersect_polyhedron([planes[..., i, :].unbind(-1) for i in range(6)], origin, ray)
        if kind is Frustum:
            return intersect_frustum(self._low[shape], self._high[shape], self._half[shape], origin, ray)
        return intersect_ellipsoid(self._low[shape], self._half[shape], origin, ray)

    # --- geometry ---

    def _positions(self, pose_F44: Tensor) -> tuple[Tensor, Tensor]:
        """Centres [F, I, 3] relative to the ground under the camera, and the state of each landmark's nearest copy.

        The latter, [F, L], is 1 at full height and 0 below the ground.
        """
        from_eye = self._site - pose_F44[:, None, [0, 2], 3]
        nearest_FL2 = torch.remainder(from_eye + PERIOD / 2, PERIOD) - PERIOD / 2
        side = torch.arange(-1, 2, device=self.device) * PERIOD
        at_FL92 = nearest_FL2[:, :, None] + torch.cartesian_prod(side, side)
        sink_radius = self._sink_radius[:, None]
        raised_FL9 = smoothstep((at_FL92.norm(dim=-1) - 0.65 * sink_radius) / (0.35 * sink_radius))
        drop = (1 - raised_FL9) * (self._height[:, None] + 0.02)
        at_FL93 = torch.stack([at_FL92[..., 0], -drop, at_FL92[..., 1]], dim=-1)
        return (at_FL93[:, self._owner] + self._centre[:, None]).flatten(1, 2), raised_FL9.amin(-1)

    def _in_view(self, pose_F44: Tensor, centre_FI3: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each bounding sphere meets the view cone, and the distance of its centre, [F, I] each."""
        from_eye = centre_FI3 - _eye(pose_F44)[:, None]
        distance = from_eye.norm(dim=-1).clamp_min(1e-6)
        ahead = (from_eye * (pose_F44[:, None, :3, 2] * pose_F44.new_tensor([1, -1, 1]))).sum(-1)
        corner = math.atan(math.hypot(1, self.size.height / self.size.width) / (2 * FOCAL_OF_WIDTH))
        angle = torch.arccos((ahead / distance).clamp(-1, 1))
        seen = angle < corner + torch.arcsin((self._bounding_radius / distance).clamp(max=1))
        return seen & (distance - self._bounding_radius < FAR) & (
            centre_FI3[..., 1] + self._bounding_radius > 0
        ), distance

    def _screen_rect(self, centre: list[float], radius: float) -> tuple[slice, slice]:
        """Rows and columns that a sphere covers. ``centre`` is in the camera's axes."""
        rows, columns, _ = self._view.shape
        x, y, z = centre
        if z - radius < 0.05:
            return slice(0, rows), slice(0, columns)
        focal = FOCAL_OF_WIDTH * columns

        def span(middle: float, pixels: int) -> slice:
            edges = [edge / depth for edge in (middle - radius, middle + radius) for depth in (z - radius, z + radius)]
            first, last = (pixels / 2 + focal * edge for edge in (min(edges), max(edges)))
            return slice(max(0, int(first)), max(0, min(pixels, int(last) + 2)))

        return span(y, rows), span(x, columns)

    def _camera_rays(self) -> Tensor:
        """Unit directions [rows, columns, 3] in the camera's axes."""
        columns, rows = self.size.width * self._supersample, self.size.height * self._supersample
        x = (torch.arange(columns, device=self.device) + 0.5 - columns / 2) / (FOCAL_OF_WIDTH * columns)
        y = (torch.arange(rows, device=self.device) + 0.5 - rows / 2) / (FOCAL_OF_WIDTH * columns)
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        return torch.nn.functional.normalize(torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], -1), dim=-1)

    def _cast_shadows(self, sun: tuple[float, float, float]) -> Tensor:
        """The landmark that shades each texel of the ground, [texels, texels] (x, z); -1 if none."""
        level = math.hypot(sun[0], sun[2])
        toward = (sun[0] / level, max(sun[1] / level, _LOWEST_SUN), sun[2] / level)
        shadows = torch.full((_TEXELS, _TEXELS), -1, dtype=torch.long)
        texel = PERIOD / _TEXELS
        sizes = self._bounding_radius[::9].cpu()
        for i, kind in enumerate(self._kinds):
            centre = self._centre[i].cpu()
            site = self._site[self._owner[i]].cpu()
            away = centre[1].item() / toward[1]
            middle = site + centre[[0, 2]] - torch.tensor([toward[0], toward[2]]) * away
            half = int(sizes[i].item() * math.hypot(1, 1 / toward[1]) / texel) + 2
            around = torch.arange(-half, half + 1)
            column, row = ((middle[axis] / texel).floor().long() + around for axis in (0, 1))
            x, z = torch.meshgrid((column + 0.5) * texel, (row + 0.5) * texel, indexing="ij")
            origin = (x - site[0] - centre[0], -centre[1].expand_as(x), z - site[1] - centre[2])
            ray = [torch.full_like(x, part) for part in toward]
            shape = torch.tensor(i, device=self.device)
            hit = self._intersect(kind, shape, *([part.to(self.device) for part in parts] for parts in (origin, ray)))
            shaded = torch.where(hit.isinf(), -1, self._owner[i]).cpu()
            index = torch.meshgrid(column % _TEXELS, row % _TEXELS, indexing="ij")
            shadows[index] = torch.maximum(shadows[index], shaded)
        return shadows.to(self.device)

    # --- colour ---

    def _colours(self, *hits: Tensor) -> Tensor:
        *shared, look_FK = hits
        return torch.stack([self._colour(*shared, look_F) for look_F in look_FK.unbind(1)], dim=1)

    def _colour(
        self,
        ray_FR3: Tensor,
        hit_FR: Tensor,
        instance_FR: Tensor,
        centre_FI3: Tensor,
        raised_FL: Tensor,
        pose_F44: Tensor,
        look_F: Tensor,
    ) -> Tensor:
        """The colour of each ray, averaged over the samples of a pixel -> uint8 [F, H, W, 3]."""
        look, eye = self._look.at(look_F), _eye(pose_F44)[:, None]
        ground_FR = torch.where(ray_FR3[..., 1] < 0, -eye[..., 1] / ray_FR3[..., 1], math.inf)
        # 1. Sky above the horizon, haze below
        colour = torch.where(ray_FR3[..., 1:2] > 0, sky_colour(ray_FR3, look), look.haze)
        # 2. The ground with shadows
        at = (pose_F44[:, None, [0, 2], 3] + ray_FR3[..., [0, 2]] * ground_FR.clamp(max=FAR)[..., None]) % PERIOD
        texel = (at / PERIOD * _TEXELS).long().clamp(max=_TEXELS - 1)
        caster = self._shadow[look_F[:, None], texel[..., 0], texel[..., 1]]
        shade = torch.where(caster < 0, 0.0, raised_FL.gather(1, caster.clamp_min(0)))
        colour = torch.where((ground_FR < FAR)[..., None], ground_colour(at, shade, look), colour)
        # 3. Shapes
        shape = instance_FR // 9
        centre = centre_FI3.gather(1, instance_FR[..., None].expand(-1, -1, 3))
        at = eye + ray_FR3 * torch.where(hit_FR.isinf(), 0, hit_FR)[..., None] - centre
        shown = surface_colour(at, self._normal(at, shape), self._half[shape], self._paint.at(shape), look)
        colour = torch.where((hit_FR < ground_FR.clamp(max=FAR))[..., None], shown, colour)
        # 4. Fog
        distance = torch.minimum(hit_FR, ground_FR)
        fog = smoothstep((distance - _FOG_FROM) / (FAR - _FOG_FROM))[..., None]
        colour = torch.where((distance < FAR)[..., None], colour + (look.haze - colour) * fog, colour)
        samples, size = self._supersample, self.size
        picture = colour.clamp(0, 1).view(len(ray_FR3), size.height, samples, size.width, samples, 3).mean(dim=(2, 4))
        return (picture * 255 + 0.5).to(torch.uint8)

    def _normal(self, at_FR3: Tensor, shape_FR: Tensor) -> Tensor:
        """Unit outward normals at surface points, relative to the centre, of each ray's shape."""
        x, h, z = at_FR3.unbind(-1)
        planes = self._planes[shape_FR]
        depth = (planes[..., :3] * at_FR3[..., None, :]).sum(-1) - planes[..., 3]
        face = depth.argmax(-1)[..., None, None].expand(*shape_FR.shape, 1, 3)
        flat = planes[..., :3].gather(-2, face)[..., 0, :]
        low, high, half = self._low[shape_FR], self._high[shape_FR], self._half[shape_FR]
        steep = (low - high) / (2 * half) * torch.sqrt(x * x + z * z)
        side = torch.stack([x, steep, z], -1)
        lid = torch.stack([torch.zeros_like(h), torch.sign(h), torch.zeros_like(h)], -1)
        around = torch.where((h.abs() > half * (1 - 1e-4))[..., None], lid, side)
        ball = torch.stack([x, h * (low / half) ** 2, z], -1)
        first_round, first_ball = self._kinds.index(Frustum), self._kinds.index(Ellipsoid)
        kind = shape_FR[..., None]
        normal = torch.where(kind < first_round, flat, torch.where(kind < first_ball, around, ball))
        return torch.nn.functional.normalize(normal, dim=-1)


def _eye(pose_F44: Tensor) -> Tensor:
    """The camera's position [F, 3] in the scene's axes, with the origin on the ground under it."""
    level = torch.zeros_like(pose_F44[:, 1, 3])
    return torch.stack([level, -pose_F44[:, 1, 3], level], -1)


def _radii(shape: Shape) -> tuple[float, float]:
    if isinstance(shape, Frustum):
        return shape.low, shape.high
    return (shape.radius, shape.radius) if isinstance(shape, Ellipsoid) else (1.0, 1.0)


def _bounding_radius(shape: Shape) -> float:
    if isinstance(shape, Polyhedron):
        return shape.bounding_radius
    return (
        max(shape.radius, shape.half_height)
        if isinstance(shape, Ellipsoid)
        else math.hypot(max(_radii(shape)), shape.half_height)
    )


def _six_planes(shape: Shape) -> list[tuple[float, float, float, float]]:
    planes = list(shape.planes) if isinstance(shape, Polyhedron) else []
    return planes + [(0.0, 0.0, 0.0, 1e3)] * (6 - len(planes))
