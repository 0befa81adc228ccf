"""The loss: soft Dice over the batch and cross entropy, each slice with a weight of its own.

Training draws slices with foreground more often than they are. With the weight w of a slice, its
uniform probability over the one it was drawn with, every sum over slices has the expectation that
it has under uniform drawing: importance sampling. For the cross entropy that is the mean of w times
the slice's mean. For Dice it is intersections and squared sums,

    Dice_c = 2 sum(w p y) / (sum(w p^2) + sum(w y^2)),

over all pixels of the batch, with probabilities p and one-hot labels y of class c. MONAI's DiceLoss
with squared sums has no weight for slices, but p and y multiplied by sqrt(w) give these very sums.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.engines.utils import default_prepare_batch
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.utils import one_hot
from torch import Tensor
from torch.nn.functional import cross_entropy

Target = Tensor | tuple[Tensor, Tensor]


class SliceLoss(torch.nn.Module):
    """`dice_weight` times Dice, the rest cross entropy; without weights MONAI's DiceCELoss.

    Args:
        dice_weight: from 0 to 1.
    """

    def __init__(self, dice_weight: float) -> None:
        super().__init__()
        self.dice_weight = dice_weight
        self.plain = DiceCELoss(
            to_onehot_y=True,
            softmax=True,
            squared_pred=True,
            batch=True,
            lambda_dice=dice_weight,
            lambda_ce=1.0 - dice_weight,
        )
        self.dice = DiceLoss(squared_pred=True, batch=True)

    def forward(self, logits: Tensor, target: Target) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (N, C + 1, S, S).
            target: labels (N, 1, S, S), alone or with weights (N,) of the slices.
        """
        if isinstance(target, Tensor):
            loss: Tensor = self.plain(logits, target)
            return loss
        label, weight = target
        root = weight.sqrt().reshape(-1, 1, 1, 1)
        classes = one_hot(label, num_classes=logits.shape[1])
        dice = self.dice(logits.softmax(dim=1) * root, classes * root)
        entropy = cross_entropy(logits, label[:, 0].long(), reduction="none").mean(dim=(1, 2))
        weighted: Tensor = (
            self.dice_weight * dice + (1.0 - self.dice_weight) * (weight * entropy).mean()
        )
        return weighted


def prepare_batch(
    batch: dict[str, Any],
    device: torch.device | str | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Target]:
    """For MONAI's trainer: images and `SliceLoss`'s target, with weights if the batch has them."""
    image, label = default_prepare_batch(batch, device, non_blocking, **kwargs)
    if "weight" not in batch:
        return image, label
    return image, (label, batch["weight"].to(device=device, non_blocking=non_blocking))
