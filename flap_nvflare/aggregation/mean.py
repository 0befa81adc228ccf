"""Rule `mean`: the weighted mean of every tensor, factors included (FedIT, arXiv 2305.05644).

    A = sum_k w_k A_k,    B = sum_k w_k B_k,    w_k >= 0, sum_k w_k = 1

Bytes up and down: one adapter a site each. Exact for heads and tokens; not for adapters,
since the product of means is not the mean of products: with dA_k = A_k - A, dB_k = B_k - B,

    sum_k w_k B_k A_k  =  B A  +  sum_k w_k dB_k dA_k

The last sum is the rule's error. The factors keep their basis, so moments stay valid.

Memory: three float64 copies of one update, and the mean products for the error: see
`products.ProductSum`. It does not grow with the sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.products import Factors, Products, side_by_side
from flap_nvflare.aggregation.rule import (
    Aggregate,
    Books,
    Contribution,
    dense_copies,
    relative_error,
)
from flap_nvflare.aggregation.weighted_means import WeightedMeans


class Mean:
    """The weighted mean of every tensor and the error that it makes in the products."""

    def __init__(self) -> None:
        self._books = Books()
        self._means = WeightedMeans()
        self._products = Products()

    def add(self, contribution: Contribution) -> None:
        """Folds one update in; see `Accumulator.add`."""
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
                return _squares(stack, b, a)
            exact = product.mean(total)
            return float((exact - b @ a).square().sum()), float(exact.square().sum())

        found = each(squares, self._books.pairs)
        lost, exact = (math.fsum(sums[index] for sums in found) for index in (0, 1))
        return Aggregate(
            tensors=dense_copies(means, self._books.dtypes),
            error=relative_error(lost, exact),
            turned=False,
        )


def _squares(stack: Sequence[Factors], b: Tensor, a: Tensor) -> tuple[float, float]:
    """Squared Frobenius norms of the error and of the exact mean product of one adapter."""
    offsets = [one._replace(b=one.b.double() - b, a=one.a.double() - a) for one in stack]
    return _product_square(*side_by_side(offsets)), _product_square(*side_by_side(stack))


def _product_square(left: Tensor, right: Tensor) -> float:
    """Squared Frobenius norm of L R, from Gram matrices of side k r alone.

    |L R|^2 = trace(R^T L^T L R) = sum of (L^T L) * (R R^T), entry by entry.
    """
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)
