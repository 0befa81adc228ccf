"""Random views of a training slice: one affine map with flips, then intensity changes.

MONAI's dictionary transforms (RandFlipd, RandAffined, RandScaleIntensityd, RandShiftIntensityd)
do the same but took 5.5 ms a 96-pixel slice on one core, more than a demo network's whole step.
Here the flips are part of the affine map, so that a slice is resampled once, by MONAI's
`AffineTransform`, from a matrix made by MONAI's own matrix functions.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

FLIP = 0.5  # probability of left-right
ROTATION = math.radians(12)
ZOOM = 0.12
SHEAR = 0.05
SHIFT = 0.06  # of the side
CONTRAST = 0.15  # relative
BRIGHTNESS = 0.2  # in standard deviations of the foreground


def augment(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random view of a slice.

    Args:
        image: (3, S, S) float32, normalised.
        label: (1, S, S) uint8.
        generator: the only source of chance; ten numbers are taken.

    Returns:
        Image (bilinear, its border continued) and label (nearest), shapes and types kept.
    """
    draws = torch.rand(10, generator=generator).tolist()
    theta = _theta(draws)
    image = _resampler("bilinear")(image[None], theta)[0]
    label = _resampler("nearest")(label[None].float(), theta)[0].to(label.dtype)
    contrast, brightness = (2 * draw - 1 for draw in draws[8:])
    return image * (1 + CONTRAST * contrast) + BRIGHTNESS * brightness, label


def _theta(draws: list[float]) -> Tensor:
    """(1, 2, 3): from a point of the result to its source, both in [-1, 1] from centre."""
    from monai.transforms.utils import create_rotate, create_scale, create_shear, create_translate

    signed = [2 * draw - 1 for draw in draws]
    mirror = -1.0 if draws[0] < FLIP else 1.0
    zooms = (mirror * (1 + ZOOM * signed[1]), 1 + ZOOM * signed[2])
    matrix = (
        create_translate(2, (2 * SHIFT * signed[3], 2 * SHIFT * signed[4]))
        @ create_rotate(2, ROTATION * signed[5])
        @ create_shear(2, (SHEAR * signed[6], SHEAR * signed[7]))
        @ create_scale(2, zooms)
    )
    return torch.as_tensor(matrix[None, :2], dtype=torch.float32)


@cache
def _resampler(mode: str) -> Any:
    from monai.networks.layers import AffineTransform

    return AffineTransform(
        normalized=True,
        mode=mode,
        padding_mode="border",
        align_corners=False,
        reverse_indexing=False,
    )
