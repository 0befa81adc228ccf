"""Endless synthetic pictures of overlapping shapes, to pre-train the small SAM on.

Every shape is given by its radius as a function of the angle, so ellipses, blobs, polygons, bars
and rings are one vectorised formula. Nothing here resembles a body or an organ on purpose: shapes,
sizes, contrasts, textures, blur, noise and the intensity window are drawn independently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SHAPES = 10  # shapes in a picture; the last `SMALL` of them are small
SMALL = 5
PADDING = 0.15  # share of shapes that are left out


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures with what is known of them.

    Attributes:
        image: (N, 3, S, S) float32, about zero mean and unit std, clipped to +-3; equal channels.
        clean: (N, S, S) the picture before bias, blur, noise and window, zero mean, unit std.
        visible: (N, K, S, S) bool, the part of every shape that no later shape covers.
        whole: (N, K, S, S) bool, every shape with what lies on it.
        small: (N, S, S) bool, where a small shape is visible.
    """

    image: Tensor
    clean: Tensor
    visible: Tensor
    whole: Tensor
    small: Tensor


def draw_pictures(count: int, size: int, generator: torch.Generator) -> Pictures:
    """Draws `count` pictures of `size` x `size` pixels."""
    edge, radius = _distances(count, size, generator)
    texture = _noise(count * SHAPES, size, (4, 12), generator).view(count, SHAPES, size, size)
    clean = _noise(count, size, (2, 4), generator) * _uniform(generator, 0.0, 0.6, count, 1, 1)
    strength = _uniform(generator, 0.0, 0.35, count, SHAPES, 1, 1)
    softness = _uniform(generator, 0.3, 1.2, count, 1, 1)
    contrast = _contrast(count, radius, generator)
    for k in range(SHAPES):
        cover = torch.sigmoid(edge[:, k] / softness)
        clean = clean + cover * (contrast[:, k, None, None] + strength[:, k] * texture[:, k])
    whole = edge > 0
    visible = whole.clone()
    for k in range(1, SHAPES):
        visible[:, :k] &= ~whole[:, k : k + 1]
    image = _camera(_standard(clean), generator)
    return Pictures(
        image=image[:, None].expand(-1, 3, -1, -1).contiguous(),
        clean=_standard(clean),
        visible=visible,
        whole=whole,
        small=visible[:, SHAPES - SMALL :].any(1),
    )


def _distances(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signed distance to every outline in pixels (N, K, S, S; inside positive), and radii."""

    def uniform(low: float, high: float) -> Tensor:
        return _uniform(generator, low, high, count, SHAPES, 1, 1)

    radius = torch.cat(
        [
            size * _uniform(generator, 0.09, 0.38, count, SHAPES - SMALL, 1, 1),
            _uniform(generator, 2.0, 7.5, count, SMALL, 1, 1) * size / 96,
        ],
        dim=1,
    )
    centre = torch.rand(count, SHAPES, 2, generator=generator) * size
    # Half of the small shapes lie on a large one, near its middle.
    host = torch.randint(SHAPES - SMALL, (count, SMALL), generator=generator)
    near = torch.randn(count, SMALL, 2, generator=generator) * 0.45
    hosted = centre.gather(1, host[..., None].expand(-1, -1, 2))
    hosted = hosted + near * radius[:, :, 0, 0].gather(1, host)[..., None]
    on_host = torch.rand(count, SMALL, 1, generator=generator) < 0.5
    centre[:, SHAPES - SMALL :] = torch.where(on_host, hosted, centre[:, SHAPES - SMALL :])
    at = torch.arange(size) + 0.5
    x = at - centre[..., 0, None, None]
    y = at[:, None] - centre[..., 1, None, None]
    turn, kind = uniform(0, math.pi), uniform(0, 1)
    stretch = torch.exp(uniform(0.0, 0.6)) * torch.where(kind > 0.9, 1.8, 1.0)
    u = (x * turn.cos() + y * turn.sin()) / stretch
    v = (y * turn.cos() - x * turn.sin()) * stretch
    distance = (u * u + v * v).sqrt()
    outline = radius * _outline(torch.atan2(v, u), kind, generator)
    edge = outline - distance
    hole = uniform(0.45, 0.75)
    ring = (uniform(0, 1) < 0.12) & (radius > 6)
    edge = torch.where(ring, torch.minimum(edge, distance - hole * outline), edge)
    left_out = uniform(0, 1) < PADDING
    return torch.where(left_out, edge.new_tensor(-99.0), edge), radius[:, :, 0, 0]


def _outline(angle: Tensor, kind: Tensor, generator: torch.Generator) -> Tensor:
    """Relative radius at every angle: ellipse, blob of four harmonics, or regular polygon."""
    count = kind.shape[:2]
    blob = torch.ones_like(angle)
    for harmonic in range(2, 6):
        size = torch.randn(*count, 1, 1, generator=generator) * 0.22 / (harmonic - 1)
        blob += size * torch.cos(
            harmonic * angle + math.tau * torch.rand(*count, 1, 1, generator=generator)
        )
    corners = torch.randint(3, 7, (*count, 1, 1), generator=generator)
    corners = torch.where(kind > 0.9, 4, corners)  # stretched rectangles: the bars
    sector = math.tau / corners
    polygon = torch.cos(sector / 2) / torch.cos(torch.remainder(angle, sector) - sector / 2)
    shape = torch.where(kind < 0.65, blob.clamp_min(0.3), polygon)
    return torch.where(kind < 0.25, 1.0, shape)


def _contrast(count: int, radius: Tensor, generator: torch.Generator) -> Tensor:
    """Signed step of every shape over what lies beneath; small shapes are mostly faint."""
    size = torch.exp(_uniform(generator, math.log(0.25), math.log(2.0), count, SHAPES))
    size = torch.where(radius < 8, size * 0.7, size)
    sign = torch.randint(2, (count, SHAPES), generator=generator) * 2 - 1
    return size * sign


def _camera(image: Tensor, generator: torch.Generator) -> Tensor:
    """Bias field, blur, noise and a random intensity window, then zero mean and unit std."""
    count, size, _ = image.shape

    def uniform(low: float, high: float) -> Tensor:
        return _uniform(generator, low, high, count, 1, 1)

    image = image + _noise(count, size, (2, 3), generator) * uniform(0.0, 0.4)
    sharp = uniform(0.4, 1.0)
    image = sharp * image + (1 - sharp) * functional.avg_pool2d(image, 3, 1, 1)
    grain = torch.randn(count, size, size, generator=generator)
    grain = torch.where(
        uniform(0, 1) < 0.5, grain, 2.0 * functional.avg_pool2d(grain[:, None], 3, 1, 1)[:, 0]
    )
    image = image + grain * torch.exp(uniform(math.log(0.03), math.log(0.4)))
    # A window cuts off what is too dark or too bright, as a display of scans does.
    low, high = uniform(-3.0, -0.6), uniform(0.6, 3.0)
    image = _standard(torch.maximum(torch.minimum(image, high), low))
    return (image * uniform(0.7, 1.3) + uniform(-0.5, 0.5)).clamp(-3, 3)


def _noise(count: int, size: int, cells: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Smooth noise (N, S, S) of about unit std; between cells[0] and cells[1] cells a side."""
    side = int(torch.randint(cells[0], cells[1] + 1, (1,), generator=generator))
    coarse = torch.randn(count, 1, side + 1, side + 1, generator=generator)
    smooth = functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    return 1.4 * smooth[:, 0]


def _standard(image: Tensor) -> Tensor:
    mean = image.mean((-2, -1), keepdim=True)
    return (image - mean) / image.std((-2, -1), keepdim=True).clamp_min(1e-3)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)
