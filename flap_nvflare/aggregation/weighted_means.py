"""Weighted means of an update's tensors, folded in as the updates arrive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor

from flap_nvflare.aggregation.exact_sum import ExactSum
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.rule import Contribution


class WeightedMeans:
    """sum_k w_k x_k / sum_k w_k of every tensor, the sum exact and divided once.

    Memory: three float64 copies of the tensors.
    """

    def __init__(self) -> None:
        self._sums: defaultdict[str, ExactSum] = defaultdict(ExactSum)

    def add(self, contribution: Contribution, names: Iterable[str]) -> None:
        """Adds the named tensors of one site."""
        tensors, weight = contribution.tensors, contribution.weight
        pieces = [(self._sums[name], tensors[name].detach()) for name in names]
        each(lambda piece: piece[0].add(piece[1].double() * weight), pieces)

    def result(self, total: float) -> dict[str, Tensor]:
        """The means in float64; `total` is the sum of all weights."""
        return {name: one.total().div_(total) for name, one in self._sums.items()}
