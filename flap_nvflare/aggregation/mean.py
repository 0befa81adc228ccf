"""`mean`: factors averaged as they are.

Paper: FedIT, arXiv 2305.05644.
Formula: A = sum_k w_k A_k, B = sum_k w_k B_k; every other tensor alike.
Bytes: one adapter up and one down, a site and round.
Exact: no; the mean of products is not the product of means. The figure of the error says by
how much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flap_nvflare.aggregation.rule import (
    Aggregate,
    Contribution,
    prepared,
    stacks,
    weighted_mean,
)


def mean(contributions: Sequence[Contribution]) -> Aggregate:
    """Weighted mean of every tensor; the factors keep their basis."""
    ordered = prepared(contributions)
    tensors = {name: weighted_mean(ordered, name) for name in sorted(ordered[0].tensors)}
    error = exact = 0.0
    for stack in stacks(ordered):
        left = torch.stack([tensors[pair.b].double() for pair in stack.pairs])
        right = torch.stack([tensors[pair.a].double() for pair in stack.pairs])
        exact += _square_norm(stack.left, stack.right)
        # |B A - M|^2 with B A - M = [B, -left] [A; right]: again a product, never formed.
        error += _square_norm(
            torch.cat([left, -stack.left], dim=2), torch.cat([right, stack.right], dim=1)
        )
    return Aggregate(tensors, (error / exact) ** 0.5 if exact > 0 else 0.0, turned=False)


def _square_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """|left @ right|^2, summed over the batch, by QR: no cancellation, no large matrix."""
    inner = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.mT, mode="r").R.mT
    return float(inner.square().sum())
