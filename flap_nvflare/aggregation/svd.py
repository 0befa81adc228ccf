"""Rule `svd`: the best rank-r cut of the exact mean product (FLAP-SAM, arXiv 2407.21739;
FlexLoRA, arXiv 2402.11505).

    M = sum_k w_k B_k A_k  =  U S V^T,      B A = the first r terms of U S V^T

Bytes up and down: one adapter a site each. Exact if M has rank r at most; otherwise the
closest matrix of rank r in the Frobenius norm (Eckart and Young), so never further from M
than the mean of the factors is. Heads and tokens: weighted mean, exact.

Sites of unequal ranks: cut to the federation's rank, or to the largest of the round. A site of
a smaller rank takes the first rows of A and columns of B: the strongest, in the gauges
`balanced` and `paper`.

Memory: three float64 copies of heads, tokens and A factors, and the mean products, see
`products.ProductSum`. It does not grow with the sites. How M is cut: see `cut`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.cut import Cut, cut_product, cut_stack
from flap_nvflare.aggregation.gauge import FIXED_GAUGES, GAUGES, check_gauge, check_start, in_gauge
from flap_nvflare.aggregation.low_rank import Terms, mean_of
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.products import Products
from flap_nvflare.aggregation.rule import (
    FIRST_ROUND,
    Accumulator,
    Aggregate,
    Books,
    Card,
    Contribution,
    Round,
    dense_copies,
    relative_error,
)
from flap_nvflare.aggregation.weighted_means import WeightedMeans

__all__ = ["FIXED_GAUGES", "GAUGES", "Svd", "aggregate_of"]


class Svd(Accumulator):
    """The best cut of the mean products to the federation's rank.

    The product B A fixes the factors only up to their gauge, B A = (B Q)(Q^-1 A). `paper`
    gives B = U and A = S V^T, `balanced` gives B = U sqrt(S) and A = sqrt(S) V^T: both
    multiply to U S V^T. To an optimiser they differ. Adam moves every entry by about its
    rate, whatever the entry's size, and the product then moves by dB A + B dA. With `paper`
    A alone holds the singular values, so one step of B moves direction i in proportion to
    s_i and one step of A moves every direction alike, however weak it is: the two factors
    learn at speeds whose ratio is s_i, and the rate would have to be tuned for each. With
    `balanced` direction i moves in proportion to sqrt(s_i) through either factor. `aligned` is
    `balanced` turned back towards the factors that the sites started from, see `gauge`: moments
    keep their meaning, and the result does not count as turned.

    Directions that the mean product does not have (all of them if it is zero) would give a
    zero column of B and a zero row of A: a direction without gradient for ever. There B's
    column is zero, as in a fresh adapter, and A's row is the strongest direction of the
    sites' own A factors (of their mean, once the products are dense) that is orthogonal to
    the rows already set, at its own length. The product stays the same.

    The sign is fixed: the entry of largest magnitude of each left vector is positive.

    Args:
        round: its gauge is `balanced`, `paper` or `aligned`, the last with the round's start.

    Raises:
        AggregationError: if the gauge is unknown, or has nothing to align with.
    """

    CARD = Card(
        paper="FlexLoRA, arXiv 2402.11505; FLAP-SAM, arXiv 2407.21739",
        formula="B A = the first r terms of the SVD of sum w_k B_k A_k",
        exact="the closest of rank r",
        unequal_ranks=True,
    )

    def __init__(self, round: Round = FIRST_ROUND) -> None:
        super().__init__(round)
        check_gauge(round)
        self._means = WeightedMeans()
        self._products = Products()

    def add(self, contribution: Contribution) -> None:
        """Folds one update in; see `Accumulator.add`."""
        check_start(contribution, self._round)
        self._books.enter(contribution)
        lefts = {pair.b for pair in self._books.pairs}
        self._means.add(contribution, contribution.tensors.keys() - lefts)
        self._take(contribution)

    def result(self) -> Aggregate:
        """The cut and its error; see `Accumulator.result`."""
        total, shares = self._books.total(), self._books.shares()
        tensors = self._means.result(total)

        def cut(pair: Pair) -> Cut:
            mean, largest = self._mean(pair, total, shares)
            gauge, rank = self._round.gauge, self._round.rank or largest
            if isinstance(mean, Tensor):
                found = cut_product(mean, tensors[pair.a], gauge, rank)
            else:
                found = cut_stack(mean, gauge, rank)
            return in_gauge(found, pair, self._round)

        return aggregate_of(each(cut, self._books.pairs), self._books, tensors, self._round)

    def _take(self, contribution: Contribution) -> None:
        """Adds one update's products."""
        self._products.add(contribution, self._books.pairs)

    def _mean(self, pair: Pair, total: float, shares: Mapping[str, float]) -> tuple[Terms, int]:
        """The product of one adapter to be cut, and the largest rank of a site."""
        product = self._products.of(pair)
        return mean_of(product, total, shares), product.rank


def aggregate_of(
    cuts: Sequence[Cut],
    books: Books,
    means: Mapping[str, Tensor],
    round: Round,
    memory: Mapping[str, Tensor] | None = None,
) -> Aggregate:
    """The aggregate of the cuts of all adapters and the means of the other tensors.

    Args:
        cuts: one for each of the books' pairs, in the round's gauge.
        books: the updates' names and dtypes.
        means: the means by name; those of factors are not used.
        round: its gauge says whether the factors have turned.
        memory: see `Aggregate`.
    """
    tensors = dict(means)
    for pair, done in zip(books.pairs, cuts, strict=True):
        tensors[pair.a], tensors[pair.b] = done.a, done.b
    lost = math.fsum(done.lost for done in cuts)
    exact = math.fsum(done.exact for done in cuts)
    return Aggregate(
        tensors=dense_copies(tensors, books.dtypes),
        error=relative_error(lost, exact),
        turned=bool(books.pairs) and round.gauge != "aligned",
        memory=dict(memory or {}),
    )
