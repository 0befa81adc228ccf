"""Rule `ranked`: every rank slice is averaged among the sites that have it
(raFLoRA, arXiv 2602.13486), then cut as by `svd`.

    M = sum_j sum_k w_k / W_j b_kj a_kj^T,    W_j = sum of w_l over the sites with r_l > j

b_kj is column j of B_k, a_kj row j of A_k. In the plain mean product a slice that few sites have
is diluted by all the others, as if these had asked for zero: round by round the global adapter
collapses towards the smallest rank. With equal ranks all W_j are the sum of all weights and the
rule is `svd`.

Bytes up and down: one adapter a site each. Exact for slices, up to the cut to the federation's
rank or the largest; the error is told against M above, the mean by slices. Heads and tokens:
weighted mean, exact.

Memory: a copy of every site's factors, so it grows with the sites. W_j is known only when all
have come, and a sum of products can't be taken apart into slices afterwards. In the end one
adapter after the other is worked on, as a stack or, with many sites, as a float64 matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.low_rank import Terms, matrix_of, stays_stacked
from flap_nvflare.aggregation.products import Factors
from flap_nvflare.aggregation.rule import FIRST_ROUND, Card, Contribution, Round
from flap_nvflare.aggregation.svd import Svd


class Ranked(Svd):
    """The best cut of the mean products by rank slices.

    Args:
        round: as for `Svd`.

    Raises:
        AggregationError: if the gauge is unknown, or has nothing to align with.
    """

    CARD = Card(
        paper="raFLoRA, arXiv 2602.13486",
        formula="B A = the first r terms of sum_j sum_k (w_k / W_j) b_kj a_kj^T",
        exact="the closest of rank r to the mean by slices",
        unequal_ranks=True,
        streaming=False,
    )

    def __init__(self, round: Round = FIRST_ROUND) -> None:
        super().__init__(round)
        self._kept: list[Contribution] = []

    def _take(self, contribution: Contribution) -> None:
        names = [name for pair in self._books.pairs for name in (pair.a, pair.b)]
        copies = {name: contribution.tensors[name].detach().clone() for name in names}
        self._kept.append(Contribution(contribution.site, contribution.weight, copies))

    def _mean(self, pair: Pair, total: float, shares: Mapping[str, float]) -> tuple[Terms, int]:
        stack = [
            Factors(one.site, shares[one.site], one.tensors[pair.b], one.tensors[pair.a])
            for one in sorted(self._kept, key=lambda one: one.site)
        ]
        scales = _scales(stack)
        stack = [one._replace(b=one.b.double() * scales[: one.b.shape[1]]) for one in stack]
        return stack if stays_stacked(stack) else matrix_of(stack), len(scales)


def _scales(stack: Sequence[Factors]) -> Tensor:
    """1 / W_j for every slice j that a site has, W_j in shares of all weights; (r,)."""
    ranks = [one.a.shape[0] for one in stack]
    every = math.fsum(one.weight for one in stack)
    sums = [math.fsum(one.weight for one in stack if one.a.shape[0] > j) for j in range(max(ranks))]
    # Divided one by one: torch would multiply by reciprocals, and 1 must stay 1.
    return torch.tensor([every / one for one in sums], dtype=torch.float64)
