"""The figures of one case: hard Dice and, if asked for, surface distances in mm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from flap_nvflare.training.scores import CaseScore, Figures


def score_case(
    case: str,
    prediction: torch.Tensor,
    label: torch.Tensor,
    classes: int,
    spacing: Sequence[float],
    tolerance: float | None = None,
) -> CaseScore:
    """Compares two label maps of one volume at its native resolution.

    Args:
        case: the case's name.
        prediction: (S, H, W) class indices, 0 is background.
        label: (S, H, W) class indices.
        classes: foreground classes C.
        spacing: mm between voxels along (S, H, W).
        tolerance: mm of the normalised surface Dice; None leaves out the figures that are made
            on request, of which those of surfaces take far longer than Dice.
    """
    dice: list[float | None] = []
    for index in range(1, classes + 1):
        predicted, true = prediction == index, label == index
        both = int(predicted.sum()) + int(true.sum())
        dice.append(2.0 * int((predicted & true).sum()) / both if both else None)
    nsd: Figures = ()
    hd95: Figures = ()
    flamby: Figures = ()
    if tolerance is not None:
        flamby = _dice_flamby(prediction, label, classes)
        nsd, hd95 = _surface(prediction, label, classes, spacing, tolerance)
    return CaseScore(
        case=case,
        dice=tuple(dice),
        dice_paper=tuple(1.0 if figure is None else figure for figure in dice),
        nsd=nsd,
        hd95=hd95,
        dice_flamby=flamby,
    )


def _dice_flamby(prediction: torch.Tensor, label: torch.Tensor, classes: int) -> Figures:
    """Dice of all foreground in place of the first class, then of the others; see `scores`."""
    pairs = [(prediction > 0, label > 0)]
    pairs += [(prediction == index, label == index) for index in range(2, classes + 1)]
    return tuple(
        2.0 * int((predicted & true).sum()) / (int(predicted.sum()) + int(true.sum()) + 1e-5)
        for predicted, true in pairs
    )


def _surface(
    prediction: torch.Tensor,
    label: torch.Tensor,
    classes: int,
    spacing: Sequence[float],
    tolerance: float,
) -> tuple[Figures, Figures]:
    """NSD and HD95 by MONAI, class by class on masks cut to what either shows."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    nsd: list[float | None] = []
    hd95: list[float | None] = []
    for index in range(1, classes + 1):
        predicted, true = prediction == index, label == index
        if not (predicted.any() and true.any()):
            one = bool(predicted.any() or true.any())
            nsd.append(0.0 if one else None)
            hd95.append(None)
            continue
        box = _box(predicted | true)
        pair = [mask[box][None, None].float() for mask in (predicted, true)]
        options = {"include_background": True, "spacing": [float(mm) for mm in spacing]}
        with warnings.catch_warnings():
            # MONAI warns of an argument that its own functions pass to one another.
            warnings.simplefilter("ignore", FutureWarning)
            near = compute_surface_dice(*pair, class_thresholds=[tolerance], **options)
            far = compute_hausdorff_distance(*pair, percentile=95, **options)
        nsd.append(_plain(near))
        hd95.append(_plain(far))
    return tuple(nsd), tuple(hd95)


def _box(mask: torch.Tensor) -> tuple[slice, ...]:
    """The smallest box around `mask`, one voxel wider on every side where there is room.

    The border keeps a mask that fills its box from losing its surface.
    """
    where = mask.nonzero()
    low = (where.amin(0) - 1).clamp(min=0).tolist()
    high = (where.amax(0) + 2).tolist()
    return tuple(slice(first, last) for first, last in zip(low, high, strict=True))


def _plain(value: torch.Tensor) -> float | None:
    figure = float(value)
    return figure if math.isfinite(figure) else None
