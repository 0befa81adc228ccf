"""Rule `mean`: the weighted mean of every tensor, factors included (FedIT, arXiv 2305.05644).

    A = sum_k w_k A_k,    B = sum_k w_k B_k,    w_k >= 0, sum_k w_k = 1

Bytes up and down: one adapter a site each. Exact for heads and tokens; not for adapters,
since the product of means is not the mean of products: with dA_k = A_k - A, dB_k = B_k - B,

    sum_k w_k B_k A_k  =  B A  +  sum_k w_k dB_k dA_k

The last sum is the rule's error. The factors keep their basis, so moments stay valid.

Sites of unequal ranks: factors are padded with zeros to the largest, FedIT's usual way. A slice
that few sites have is diluted by the zeros of the others: see `ranked`.

Memory: three float64 copies of one update, and the mean products for the error: see
`products.ProductSum`. It does not grow with the sites.
"""

from __future__ import annotations

import math

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.low_rank import energy_of
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.products import Products
from flap_nvflare.aggregation.ranks import check_ranks, from_means, grown
from flap_nvflare.aggregation.rule import (
    FIRST_ROUND,
    Accumulator,
    Aggregate,
    Card,
    Contribution,
    Round,
    dense_copies,
    relative_error,
)
from flap_nvflare.aggregation.weighted_means import WeightedMeans


class Mean(Accumulator):
    """The weighted mean of every tensor and the error that it makes in the products."""

    CARD = Card(
        paper="FedIT, arXiv 2305.05644",
        formula="A = sum w_k A_k, B = sum w_k B_k",
        exact="no: the mean of products is not the product of means",
        linear=True,
        unequal_ranks=True,
    )

    def __init__(self, round: Round = FIRST_ROUND) -> None:
        super().__init__(round)
        self._means = WeightedMeans()
        self._products = Products()

    def add(self, contribution: Contribution) -> None:
        """Folds one update in; see `Accumulator.add`."""
        check_ranks(contribution, self._round)
        self._books.enter(contribution)
        self._means.add(contribution, contribution.tensors)
        self._products.add(contribution, self._books.pairs)

    def result(self) -> Aggregate:
        """The means and their error; see `Accumulator.result`."""
        total, shares = self._books.total(), self._books.shares()
        means = self._means.result(total)

        def squares(pair: Pair) -> tuple[float, float]:
            product, a, b = self._products.of(pair), means[pair.a], means[pair.b]
            stack = product.stack(shares)
            if stack is not None:
                return energy_of(from_means(stack, b, a)), energy_of(stack)
            exact = product.mean(total)
            return energy_of(exact - b @ a), energy_of(exact)

        found = each(squares, self._books.pairs)
        lost, exact = (math.fsum(sums[index] for sums in found) for index in (0, 1))
        for pair in self._books.pairs:
            means[pair.b], means[pair.a] = grown(means[pair.b], means[pair.a], pair.a, self._round)
        return Aggregate(
            tensors=dense_copies(means, self._books.dtypes),
            error=relative_error(lost, exact),
            turned=False,
        )
