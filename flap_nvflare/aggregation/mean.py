"""Rule `mean`: the weighted mean of every tensor, factors included (FedIT, arXiv 2305.05644).

    A = sum_k w_k A_k,    B = sum_k w_k B_k,    w_k >= 0, sum_k w_k = 1

Bytes up and down: one adapter a site each. Exact for heads and tokens; not for adapters,
since the product of means is not the mean of products: with dA_k = A_k - A, dB_k = B_k - B,

    sum_k w_k B_k A_k  =  B A  +  sum_k w_k dB_k dA_k

The last sum is the rule's error. The factors keep their basis, so moments stay valid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.rule import (
    Aggregate,
    Contribution,
    mean_tensor,
    pairs_of,
    prepared,
    relative_error,
)


def mean(contributions: Sequence[Contribution]) -> Aggregate:
    """The weighted mean of every tensor and the error that it makes in the products.

    Raises:
        AggregationError: if the contributions do not fit together.
    """
    ordered = prepared(contributions)
    means = {name: mean_tensor(ordered, name) for name in sorted(ordered[0].tensors)}
    errors, exacts = [], []
    for pair in pairs_of(ordered):
        error, exact = _squares(ordered, pair, means)
        errors.append(error)
        exacts.append(exact)
    return Aggregate(
        tensors={name: total.to(ordered[0].tensors[name].dtype) for name, total in means.items()},
        error=relative_error(math.fsum(errors), math.fsum(exacts)),
        turned=False,
    )


def _squares(
    contributions: Sequence[Contribution], pair: Pair, means: dict[str, Tensor]
) -> tuple[float, float]:
    """Squared Frobenius norms of the error and of the exact mean product of one adapter."""
    lefts, rights, left_offsets, right_offsets = [], [], [], []
    for one in contributions:
        root = math.sqrt(one.weight)
        a, b = one.tensors[pair.a].detach().double(), one.tensors[pair.b].detach().double()
        lefts.append(root * b)
        rights.append(root * a)
        left_offsets.append(root * (b - means[pair.b]))
        right_offsets.append(root * (a - means[pair.a]))
    return _product_squares(left_offsets, right_offsets), _product_squares(lefts, rights)


def _product_squares(lefts: list[Tensor], rights: list[Tensor]) -> float:
    """Squared Frobenius norm of sum_k L_k R_k, from Gram matrices of side k * rank alone.

    |L R|^2 = trace(R^T L^T L R) = sum of (L^T L) * (R R^T), entry by entry.
    """
    left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=0)
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)
