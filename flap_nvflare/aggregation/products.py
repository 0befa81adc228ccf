"""The exact weighted mean product of one adapter, M = sum_k w_k B_k A_k, in bounded memory.

With few sites the factors themselves say all: stacked side by side they are M = L R with
L = [sqrt(w_k) B_k] (out, n) and R = [sqrt(w_k) A_k] (n, in), n the sum of the sites' ranks, and
every matrix to work on has the side n. With many sites n outgrows the matrix. From then on each
product is formed as it arrives, added exactly, and its factors are dropped.

The turn from one form to the other depends on the sum of the ranks alone, so the result does
not depend on the updates' order. It comes when n passes half the shorter side of M: there the
cut of the stack starts to cost more than that of M (768 x 768, rank 32: from the 13th site on).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.exact_sum import ExactSum
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.rule import Contribution

# Of the largest entry 1.5e-11 may be lost, a thousandth of what float32 factors resolve.
_LEVELS = 2


class Factors(NamedTuple):
    """One site's factors of one adapter, in the dtype in which they came.

    Attributes:
        site: the site's name.
        weight: its weight, or its share of all weights.
        b: B, (out, rank).
        a: A, (rank, in).
    """

    site: str
    weight: float
    b: Tensor
    a: Tensor


class ProductSum:
    """Sum of the weighted products of one adapter.

    Memory: copies of the factors up to half the side of the product in all; afterwards two
    float64 matrices of the product's shape, whatever the number of sites.

    Attributes:
        shape: (out, in) of the product; known after the first addend.
        rank: the largest rank of a site so far.
    """

    def __init__(self) -> None:
        self.shape = (0, 0)
        self.rank = 0
        self._ranks = 0  # of all sites together
        self._kept: list[Factors] = []
        self._dense: ExactSum | None = None

    def add(self, contribution: Contribution, pair: Pair) -> None:
        """Adds one site's product; its weight as it is, not its share."""
        a, b = contribution.tensors[pair.a].detach(), contribution.tensors[pair.b].detach()
        self.shape = (b.shape[0], a.shape[1])
        self.rank = max(self.rank, a.shape[0])
        self._ranks += a.shape[0]
        if self._dense is None:
            # Copies, so that the message that the tensors lie in can go.
            one = Factors(contribution.site, contribution.weight, b.clone(), a.clone())
            self._kept.append(one)
            if 2 * self._ranks <= min(self.shape):
                return
            self._dense = ExactSum(_LEVELS)
            for kept in self._kept:
                self._dense.add((kept.b.double() * kept.weight) @ kept.a.double())
            self._kept.clear()
        else:
            self._dense.add((b.double() * contribution.weight) @ a.double())

    def stack(self, shares: Mapping[str, float]) -> list[Factors] | None:
        """The factors of all sites, sorted by site, with their shares; None if M is dense."""
        if self._dense is not None:
            return None
        return [
            kept._replace(weight=shares[kept.site])
            for kept in sorted(self._kept, key=lambda kept: kept.site)
        ]

    def mean(self, total: float) -> Tensor:
        """M (out, in) in float64, by the sum of all weights; only of the dense form."""
        if self._dense is None:
            raise ValueError("the factors are still stacked; use stack")
        return self._dense.total().div_(total)


class Products:
    """The sums of all adapters of an update."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, ProductSum] = defaultdict(ProductSum)

    def add(self, contribution: Contribution, found: Sequence[Pair]) -> None:
        """Adds one site's products."""
        sums = [self._sums[pair.stem] for pair in found]
        each(lambda one: one[0].add(contribution, one[1]), zip(sums, found, strict=True))

    def of(self, pair: Pair) -> ProductSum:
        """The sum of one adapter."""
        return self._sums[pair.stem]


def side_by_side(stack: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """L (out, n) and R (n, in) of M = L R, in float64; n is the sum of the ranks."""
    left = [one.b.double() * math.sqrt(one.weight) for one in stack]
    right = [one.a.double() * math.sqrt(one.weight) for one in stack]
    return torch.cat(left, dim=1), torch.cat(right, dim=0)
