"""What the small SAM is asked while it is pre-trained, and what a wrong answer costs.

Points and boxes with the masks they mean, SAM's losses for masks (Kirillov et al.,
arXiv 2304.02643, appendix A), and the dense task that needs no prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flap_nvflare.sam.shapes import Pictures

PROMPTS = 3  # prompts for each picture
TARGETS = 4  # maps of the task without prompts: shape, small shape, edge, clean picture


def draw_prompts(pictures: Pictures, generator: torch.Generator) -> tuple[Any, Tensor]:
    """Chooses shapes and prompts for them.

    Returns:
        `((coordinates, labels) or None, boxes or None)` for SAM's prompt encoder, and the
        targets as bool (N P, S, S). Points and boxes take turns at random.
    """
    size = pictures.visible.shape[-1]
    area = pictures.visible.sum((2, 3))
    usable = (area >= 9).float() * (1 + 2 * (area < 200)) + 1e-6
    chosen = torch.multinomial(usable, PROMPTS, generator=generator)
    index = chosen[:, :, None, None].expand(-1, -1, size, size)
    target = pictures.visible.gather(1, index).flatten(0, 1)
    whole = torch.rand(len(target), 1, 1, generator=generator) < 0.25
    target = torch.where(whole, pictures.whole.gather(1, index).flatten(0, 1), target)
    if torch.rand(1, generator=generator) < 0.4:
        return (None, _boxes(target, generator)), target
    inside = 1 + int(torch.randint(3, (1,), generator=generator))
    outside = int(torch.randint(3, (1,), generator=generator)) if inside > 1 else 0
    places = [
        torch.multinomial(flat.flatten(1).float() + 1e-6, number, True, generator=generator)
        for flat, number in ((target, inside), (~target, outside))
        if number
    ]
    place = torch.cat(places, 1)
    labels = torch.tensor([1.0] * inside + [0.0] * outside).expand(len(target), -1)
    coordinates = torch.stack([place % size, place // size], -1).float()
    return ((coordinates, labels), None), target


def _boxes(target: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes (N, 4) as x0, y0, x1, y1 in pixels, each side moved by up to a tenth."""
    size = target.shape[-1]
    sides = []
    for axis in (1, 2):  # columns, then rows
        used = target.any(axis)
        low = used.float().argmax(1)
        high = size - 1 - used.flip(1).float().argmax(1)
        sides.append(torch.stack([low, high], 1).float())
    length = torch.stack([s[:, 1] - s[:, 0] for s in sides], 1)
    noise = torch.randn(len(target), 2, 2, generator=generator).clamp(-2, 2) * 0.05
    box = torch.stack(sides, 2) + noise * length[:, None] + noise.sign()
    return box.clamp(0, size - 1).flatten(1)


def mask_loss(masks: Tensor, iou: Tensor, target: Tensor) -> Tensor:
    """Focal + Dice of the best of masks 1 to 3 and of mask 0, and the IoU head's error."""
    soft = functional.avg_pool2d(target[:, None].float(), 2)
    probability = masks.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(
        masks, soft.expand_as(masks), reduction="none"
    )
    focal = (entropy * (probability - soft).square()).mean((2, 3))
    overlap = (probability * soft).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((2, 3)) + soft.sum((2, 3)) + 1)
    loss = 20 * focal + dice
    with torch.no_grad():
        hard, truth = masks > 0, soft > 0.5
        truth_iou = (hard & truth).sum((2, 3)) / (hard | truth).sum((2, 3)).clamp_min(1)
    quality = (iou - truth_iou).square().mean()
    return loss[:, 1:].amin(1).mean() + 0.5 * loss[:, 0].mean() + quality


def dense_loss(maps: Tensor, pictures: Pictures) -> Tensor:
    """Cross entropy of shape, small shape and edge, and squared error of the clean picture."""
    shape = pictures.visible.any(1)
    region = (pictures.visible * torch.arange(1, pictures.visible.shape[1] + 1)[:, None, None]).sum(
        1
    )
    region = region[:, None].float()
    edge = functional.max_pool2d(region, 3, 1, 1) + functional.max_pool2d(-region, 3, 1, 1) > 0
    truth = torch.stack([shape, pictures.small, edge[:, 0]], 1).float()
    half = functional.avg_pool2d(torch.cat([truth, pictures.clean[:, None]], 1), 2)
    weight = 1 + 4 * half[:, 1:3]
    entropy = functional.binary_cross_entropy_with_logits
    return (
        entropy(maps[:, :1], half[:, :1])
        + entropy(maps[:, 1:3], half[:, 1:3], weight=weight)
        + functional.mse_loss(maps[:, 3:], half[:, 3:])
    )
