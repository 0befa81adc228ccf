"""Weighted means of an update's tensors, folded in as the updates arrive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flap_nvflare.aggregation.exact_sum import ExactSum
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.ranks import padded
from flap_nvflare.aggregation.rule import Contribution


class WeightedMeans:
    """sum_k w_k x_k / sum_k w_k of every tensor, the sum exact and divided once.

    Factors of unequal ranks are padded with zeros up to the largest (FedIT's usual way): each
    rank has an exact sum of its own, and these are added by rank.

    Memory: three float64 copies of the tensors, of factors for every rank that occurs.
    """

    def __init__(self) -> None:
        self._sums: defaultdict[str, dict[torch.Size, ExactSum]] = defaultdict(dict)

    def add(self, contribution: Contribution, names: Iterable[str]) -> None:
        """Adds the named tensors of one site."""
        tensors, weight = contribution.tensors, contribution.weight
        found = [(name, tensors[name].detach()) for name in names]
        pieces = [(self._sums[n].setdefault(x.shape, ExactSum()), x) for n, x in found]
        each(lambda piece: piece[0].add(piece[1].double() * weight), pieces)

    def result(self, total: float) -> dict[str, Tensor]:
        """The means in float64; `total` is the sum of all weights."""
        return {name: _whole(parts).div_(total) for name, parts in self._sums.items()}


def _whole(parts: Mapping[torch.Size, ExactSum]) -> Tensor:
    """The sum of the parts, smallest shape first, each padded with zeros at its end."""
    shapes = sorted(parts)
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    totals = [padded(parts[shape].total(), largest) for shape in shapes]
    return sum(totals[1:], start=totals[0])
