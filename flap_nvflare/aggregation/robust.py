"""What the robust rules share: a bounded mean of the sites' products, cut to the rank.

Factors have a gauge, B A = (B Q)(Q^-1 A): a median or a distance of factors would say as much
about the basis as about the update. So all that is robust about adapters is done on products,
by their inner products alone (see `geometry`). With M_0 the product that the sites started from
and M_k the product of site k, all adapters as one vector:

    c_k = min(1, m / |M_k - M_0|),         m the median of the lengths |M_k - M_0|
    M   = M_0 + sum_k p_k c_k (M_k - M_0) = (1 - sum_k p_k c_k) M_0 + sum_k p_k c_k M_k

No site moves the result by more than p_k m, and while fewer than half are hostile m lies
between the honest lengths. The last form is a mean with the start as one site more, cut as by
rule `svd`, in its gauges. Without the start M_0 is zero, and m bounds the whole product.

A weight is what a site says of itself. p_k is the share of min(w_k, the (hostile + 1)-th
largest weight): at least one honest site claims as much.

Memory: a copy of every update until the round ends, it grows with the sites; and in the end the
stacked factors of one adapter after the other, or with many sites its float64 matrix. The time
is linear in the sites, but for what a rule adds to choose among them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.cut import Cut, cut_product, cut_stack
from flap_nvflare.aggregation.gauge import check_gauge, check_start, in_gauge
from flap_nvflare.aggregation.geometry import distances_from
from flap_nvflare.aggregation.low_rank import matrix_of, stays_stacked
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.products import Factors
from flap_nvflare.aggregation.rule import (
    FIRST_ROUND,
    Accumulator,
    Aggregate,
    AggregationError,
    Contribution,
    Round,
    dense_copies,
)
from flap_nvflare.aggregation.svd import aggregate_of

_START = "(start)"
# A site with a longer change than this allows is left out instead of clipped; see `Books`.
_LEAST_PART = 1e-250
# Of the start less than this is what is left of 1 by rounding.
_ROUNDING = 2.0**-48


class Robust(Accumulator):
    """Keeps all updates; the rules say how a head's coordinates and which sites count.

    `Aggregate.error` is that of the cut against M above.

    Raises:
        AggregationError: if the round's gauge is unknown.
    """

    def __init__(self, round: Round = FIRST_ROUND) -> None:
        super().__init__(round)
        check_gauge(round)
        self._kept: dict[str, Contribution] = {}

    @abstractmethod
    def _centre(self, ordered: Tensor) -> Tensor:
        """One tensor in float64 of those of all sites, (n, ...), each coordinate in order."""

    @abstractmethod
    def _chosen(self, sites: Sequence[Contribution]) -> list[int]:
        """Sites whose adapters count, by index."""

    def add(self, contribution: Contribution) -> None:
        """Keeps a copy of one update; see `Accumulator.add`."""
        check_start(contribution, self._round)
        self._books.enter(contribution)
        tensors = {name: tensor.detach().clone() for name, tensor in contribution.tensors.items()}
        self._kept[contribution.site] = Contribution(
            contribution.site, float(contribution.weight), tensors
        )

    def result(self) -> Aggregate:
        """The robust aggregate; see `Accumulator.result`.

        Raises:
            AggregationError: also if there are too few sites for `hostile` of them.
        """
        self._books.total()  # refuses an empty round
        sites = [self._kept[site] for site in sorted(self._kept)]
        least = self.least(self._round.hostile)
        if len(sites) < least:
            raise AggregationError(
                f"{len(sites)} sites are too few for hostile: {self._round.hostile}, which needs "
                f"{least}; wait for more sites (min_sites) or lower hostile"
            )
        factors = {name for pair in self._books.pairs for name in (pair.a, pair.b)}
        heads = {
            name: self._centre(_in_order([one.tensors[name] for one in sites]))
            for name in self._books.dtypes.keys() - factors
        }
        if not factors:
            return Aggregate(dense_copies(heads, self._books.dtypes), error=0.0, turned=False)
        start = self._start(sites[0].tensors)
        chosen = [sites[k] for k in self._chosen(sites)]
        found = aggregate_of(self._cuts(sites, chosen, start), self._books, heads, self._round)
        excluded = {one.site for one in sites} - {one.site for one in chosen}
        return dataclasses.replace(found, excluded=tuple(sorted(excluded)))

    def _cuts(
        self,
        sites: Sequence[Contribution],
        chosen: Sequence[Contribution],
        start: Mapping[str, Tensor],
    ) -> list[Cut]:
        """Of every adapter the cut of the clipped mean of the sites that count."""
        pairs = self._books.pairs
        lengths = distances_from(start, [one.tensors for one in chosen], pairs)
        bound = _weight_bound([one.weight for one in sites], self._round.hostile)
        parts = _clipped(lengths, [min(one.weight, bound) for one in chosen])
        counted = [
            (one.site, part, one.tensors)
            for one, part in zip(chosen, parts, strict=True)
            if part > _LEAST_PART
        ]
        rest = 1 - math.fsum(parts)
        if rest > _ROUNDING:
            counted.append((_START, rest, start))

        def cut(pair: Pair) -> Cut:
            stack = [Factors(site, part, one[pair.b], one[pair.a]) for site, part, one in counted]
            rank = self._round.rank or max(one.tensors[pair.a].shape[0] for one in sites)
            return in_gauge(_cut(stack, self._round.gauge, rank), pair, self._round)

        return each(cut, pairs)

    def _start(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors that the sites started from, in the dtypes of the updates, or zeros."""
        found = {}
        for pair in self._books.pairs:
            for name, along in ((pair.a, 1), (pair.b, 0)):
                known = self._round.start.get(name, torch.zeros_like(like[name]))
                if name not in self._round.start and self._round.start:
                    raise AggregationError(
                        f"tensor {name!r} is missing in the round's start; give all of it or none",
                        name,
                    )
                if known.dim() != 2 or known.shape[along] != like[name].shape[along]:
                    raise AggregationError(
                        f"tensor {name!r} is {tuple(known.shape)} in the round's start, "
                        f"{tuple(like[name].shape)} in the updates; start from what was sent",
                        name,
                    )
                found[name] = known.detach().to(like[name].dtype)
        return found


def _in_order(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors of all sites, (n, ...), every coordinate from its least to its largest value.

    By numpy, which sorts along the sites twenty times faster than torch, in the shortest numbers
    that hold the updates'.
    """
    kind = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.from_numpy(np.sort(torch.stack([one.to(kind) for one in tensors]).numpy(), axis=0))


def _cut(stack: Sequence[Factors], gauge: str, rank: int) -> Cut:
    """The cut of a sum of products, from their factors while that is cheaper."""
    if stays_stacked(stack):
        return cut_stack(stack, gauge, rank)
    mean = torch.zeros(max(one.a.shape[0] for one in stack), stack[0].a.shape[1]).double()
    for one in stack:
        mean[: one.a.shape[0]].add_(one.a.double(), alpha=one.weight)
    return cut_product(matrix_of(stack), mean, gauge, rank)


def _weight_bound(weights: Sequence[float], hostile: int) -> float:
    """The (hostile + 1)-th largest weight, above which none counts."""
    return sorted(weights, reverse=True)[min(hostile, len(weights) - 1)]


def _clipped(lengths: Sequence[float], weights: Sequence[float]) -> list[float]:
    """p_k c_k of the sites that count."""
    bound, total = statistics.median(lengths), math.fsum(weights)
    return [
        weight / total * (bound / length if length > bound else 1.0)
        for length, weight in zip(lengths, weights, strict=True)
    ]
