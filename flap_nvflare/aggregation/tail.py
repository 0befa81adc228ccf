"""Rule `tail`: the best rank-r cut, and what it drops waits at the server for the next round.

    X = sum_k w_k B_k A_k + E,   B A = the first r terms of the SVD of X,   E' = X - B A

E is what the last round dropped, zero at first. This is error feedback (Seide et al.,
Interspeech 2014; Karimireddy et al., arXiv 1901.09847) at the server, with the cut as the
compressor. Why it is right: the sites of the next round start from B A and return B A + d_k, so
that round's X' = B A + sum_k w_k d_k + E' = X + sum_k w_k d_k. So X is the sum of all mean
changes so far, as if nothing had ever been cut: a direction that is too weak in each single
round, but is asked for in many, grows in E until the cut keeps it. With `svd` it is lost anew
every round. Nothing is counted twice, since B A + E' = X.

Bytes up and down: one adapter a site each; E' never leaves the server. What is sent is the
closest of rank r to X; the error is told against this round's own mean product. The factors
turn as those of `svd` do, and have the same gauges.

Memory: that of `svd`, and between rounds E' in float32: as factors `<stem>.tail_b` (out, q) and
`<stem>.tail_a` (q, in) while the ranks of all sites and q add up to half the shorter side at
most, as the matrix `<stem>.tail` (out, in) from then on. It does not grow with the sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.cut import Cut, cut_product, cut_svd
from flap_nvflare.aggregation.gauge import in_gauge
from flap_nvflare.aggregation.low_rank import (
    Terms,
    energy_of,
    extended,
    factors_of,
    kept_terms,
    matrix_of,
    shape_of,
)
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.products import Factors
from flap_nvflare.aggregation.rule import Aggregate, AggregationError, Card, dense_copies
from flap_nvflare.aggregation.stack_svd import StackSvd
from flap_nvflare.aggregation.svd import Svd, aggregate_of


class Tail(Svd):
    """The best cut of the mean products and of what the cuts before it dropped.

    Args:
        round: as for `Svd`, and its memory.

    Raises:
        AggregationError: if the gauge is unknown, or has nothing to align with.
    """

    CARD = Card(
        paper="of this project; error feedback, arXiv 1901.09847",
        formula="B A = the first r terms of sum w_k B_k A_k + E; E = what they miss",
        exact="over the rounds: what is cut is kept for the next",
        unequal_ranks=True,
    )

    def result(self) -> Aggregate:
        """The cut, its error and what it dropped; see `Accumulator.result`."""
        total, shares = self._books.total(), self._books.shares()
        dtypes = self._books.dtypes
        tensors = self._means.result(total)

        def cut(pair: Pair) -> _Kept:
            mean, largest = self._mean(pair, total, shares)
            rank = self._round.rank or largest
            old = _old(self._round.memory, pair, shape_of(mean))
            asked = _asked(mean, old)
            if isinstance(asked, Tensor):
                found = cut_product(asked, tensors[pair.a], self._round.gauge, rank)
                found = in_gauge(found, pair, self._round)
                return _dense(pair, found, asked, old, energy_of(mean), dtypes[pair.b])
            svd = StackSvd.of(asked)
            found = in_gauge(cut_svd(svd, self._round.gauge, rank), pair, self._round)
            return _stacked(pair, found, svd, rank, old, energy_of(mean))

        kept = each(cut, self._books.pairs)
        cuts = [one.cut for one in kept]
        memory = dict(sorted(item for one in kept for item in one.memory.items()))
        return aggregate_of(cuts, self._books, tensors, self._round, memory)


class _Kept(NamedTuple):
    """The cut, its `lost` and `exact` those of this round's mean, and what it dropped."""

    cut: Cut
    memory: dict[str, Tensor]


def _old(
    memory: Mapping[str, Tensor], pair: Pair, shape: tuple[int, int]
) -> Tensor | list[Factors]:
    """E in float64, or its factors; none if there is no memory."""
    name = f"{pair.stem}.tail"
    matrix = memory.get(name)
    if matrix is None:
        return factors_of(memory, pair.stem, "tail", shape)
    if tuple(matrix.shape) != shape:
        raise AggregationError(
            f"{name!r} is {tuple(matrix.shape)}; expected {shape}: go on from the adapter that "
            "it belongs to",
            name,
        )
    return matrix.double()


def _asked(mean: Terms, old: Tensor | list[Factors]) -> Terms:
    """X = M + E."""
    return matrix_of(mean) + old if isinstance(old, Tensor) else extended(mean, old)


def _dense(
    pair: Pair,
    cut: Cut,
    asked: Tensor,
    old: Tensor | list[Factors],
    exact: float,
    dtype: torch.dtype,
) -> _Kept:
    """What is left of X beside the factors as they are sent, their rounding included."""
    b, a = (factor.to(dtype).double() for factor in (cut.b, cut.a))
    left = asked - b @ a
    before = old if isinstance(old, Tensor) else matrix_of(old) if old else 0.0
    # M - B A = (X - E) - (X - E') = E' - E.
    lost = energy_of(left - before)
    return _Kept(cut._replace(lost=lost, exact=exact), {f"{pair.stem}.tail": left.float()})


def _stacked(
    pair: Pair,
    cut: Cut,
    svd: StackSvd,
    rank: int,
    old: Tensor | list[Factors],
    exact: float,
) -> _Kept:
    """The terms of the SVD after the first r, as far as float32 resolves them beside X."""
    squares = svd.s.square()
    last = max(kept_terms(squares, 1.0, float(squares.sum())), rank)
    b, a = svd.terms(rank, last)
    change = [Factors("", 1.0, -one.b.double(), one.a) for one in old]
    memory = {}
    if b.shape[1]:
        change.append(Factors("", 1.0, b, a))
        names = {f"{pair.stem}.tail_a": a, f"{pair.stem}.tail_b": b}
        memory = dense_copies(names, dict.fromkeys(names, torch.float32))
    lost = energy_of(change) if change else 0.0
    return _Kept(cut._replace(lost=lost, exact=exact), memory)
