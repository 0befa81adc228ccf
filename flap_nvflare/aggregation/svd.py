"""Rule `svd`: the best rank-r cut of the exact mean product (FLAP-SAM, arXiv 2407.21739;
FlexLoRA, arXiv 2402.11505).

    M = sum_k w_k B_k A_k  =  U S V^T,      B A = the first r terms of U S V^T

Bytes up and down: one adapter a site each. Exact if M has rank r at most; otherwise the
closest matrix of rank r in the Frobenius norm (Eckart and Young), so never further from M
than the mean of the factors is. Heads and tokens: weighted mean, exact.

Memory: three float64 copies of heads, tokens and A factors, and the mean products, see
`products.ProductSum`. It does not grow with the sites. How M is cut: see `cut`.
"""

from __future__ import annotations

import math

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.cut import Cut, cut_product, cut_stack
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.products import Products
from flap_nvflare.aggregation.rule import (
    Aggregate,
    AggregationError,
    Books,
    Contribution,
    dense_copies,
    relative_error,
)
from flap_nvflare.aggregation.weighted_means import WeightedMeans

GAUGES = ("balanced", "paper")


class Svd:
    """The best cut of the mean products to the adapters' own rank.

    The product B A fixes the factors only up to their gauge, B A = (B Q)(Q^-1 A). `paper`
    gives B = U and A = S V^T, `balanced` gives B = U sqrt(S) and A = sqrt(S) V^T: both
    multiply to U S V^T. To an optimiser they differ. Adam moves every entry by about its
    rate, whatever the entry's size, and the product then moves by dB A + B dA. With `paper`
    A alone holds the singular values, so one step of B moves direction i in proportion to
    s_i and one step of A moves every direction alike, however weak it is: the two factors
    learn at speeds whose ratio is s_i, and the rate would have to be tuned for each. With
    `balanced` direction i moves in proportion to sqrt(s_i) through either factor.

    Directions that the mean product does not have (all of them if it is zero) would give a
    zero column of B and a zero row of A: a direction without gradient for ever. There B's
    column is zero, as in a fresh adapter, and A's row is the strongest direction of the
    sites' own A factors (of their mean, once the products are dense) that is orthogonal to
    the rows already set, at its own length. The product stays the same.

    The sign is fixed: the entry of largest magnitude of each left vector is positive.

    Args:
        gauge: `balanced` or `paper`.

    Raises:
        AggregationError: if the gauge is unknown.
    """

    def __init__(self, gauge: str = "balanced") -> None:
        if gauge not in GAUGES:
            raise AggregationError(f"gauge {gauge!r} is not known; expected one of {GAUGES}")
        self._gauge = gauge
        self._books = Books()
        self._means = WeightedMeans()
        self._products = Products()

    def add(self, contribution: Contribution) -> None:
        """Folds one update in; see `Accumulator.add`."""
        self._books.enter(contribution)
        lefts = {pair.b for pair in self._books.pairs}
        self._means.add(contribution, contribution.tensors.keys() - lefts)
        self._products.add(contribution, self._books.pairs)

    def result(self) -> Aggregate:
        """The cut and its error; see `Accumulator.result`."""
        total, shares = self._books.total(), self._books.shares()
        tensors = self._means.result(total)

        def cut(pair: Pair) -> Cut:
            product = self._products.of(pair)
            stack = product.stack(shares)
            if stack is None:
                return cut_product(product.mean(total), tensors[pair.a], self._gauge)
            return cut_stack(stack, self._gauge)

        cuts = each(cut, self._books.pairs)
        for pair, done in zip(self._books.pairs, cuts, strict=True):
            tensors[pair.a], tensors[pair.b] = done.a, done.b
        lost = math.fsum(done.lost for done in cuts)
        exact = math.fsum(done.exact for done in cuts)
        return Aggregate(
            tensors=dense_copies(tensors, self._books.dtypes),
            error=relative_error(lost, exact),
            turned=bool(self._books.pairs),
        )
