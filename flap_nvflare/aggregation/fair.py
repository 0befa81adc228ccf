"""Rule `fair`: the mean A, and the B that brings B A nearest to the mean product
(LoRA-FAIR, arXiv 2411.14961), in closed form.

    A = sum_k w_k A_k,   B = argmin |M - B A|^2 + lambda |B - B0|^2,   B0 = sum_k w_k B_k
                           = B0 + (M - B0 A) A^T (A A^T + lambda I)^-1

with M = sum_k w_k B_k A_k and norms of Frobenius. The paper corrects B by gradient steps on a
similarity of B A with M; the least squares have this one solution. lambda is 0.01 of the mean
eigenvalue of A A^T, so that it means the same for A of any length: it keeps B near its mean in
directions that A hardly has.

Bytes up and down: one adapter a site each. Not exact: B A has rank r. But never further from M
than the mean of the factors, whose distance is what the minimum has at B = B0, and never nearer
than the best cut. The factors keep their basis, so moments stay valid.

Sites of unequal ranks: factors are padded with zeros to the largest.

Memory: three float64 copies of one update, and the mean products: see `products.ProductSum`.
It does not grow with the sites. M is not formed while the factors are stacked:

    M - B0 A = sum_k w_k (B_k - B0) (A_k - A)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.low_rank import energy_of
from flap_nvflare.aggregation.mean import Mean
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.products import Factors, ProductSum
from flap_nvflare.aggregation.ranks import from_means, grown
from flap_nvflare.aggregation.rule import Aggregate, Card, dense_copies, relative_error

# lambda as a share of the mean eigenvalue of A A^T.
_PULL = 0.01


class Fair(Mean):
    """The mean A with the B that fits it; updates are folded in as for `mean`.

    Args:
        round: its rank.
    """

    CARD = Card(
        paper="LoRA-FAIR, arXiv 2411.14961",
        formula="A = sum w_k A_k; B = the nearest to sum w_k B_k A_k with that A",
        exact="the closest with the mean A",
        unequal_ranks=True,
    )

    def result(self) -> Aggregate:
        """The means with every B corrected, and the error; see `Accumulator.result`."""
        total, shares = self._books.total(), self._books.shares()
        pairs = self._books.pairs
        tensors = self._means.result(total)

        def fit(pair: Pair) -> _Fit:
            product, b, a = self._products.of(pair), tensors[pair.b], tensors[pair.a]
            b, a = grown(b, a, pair.a, self._round)
            stack = product.stack(shares)
            return _fit_stack(stack, b, a) if stack is not None else _fit(product, total, b, a)

        fits = each(fit, pairs)
        for pair, done in zip(pairs, fits, strict=True):
            tensors[pair.b], tensors[pair.a] = done.b, done.a
        lost, exact = math.fsum(one.lost for one in fits), math.fsum(one.exact for one in fits)
        return Aggregate(
            tensors=dense_copies(tensors, self._books.dtypes),
            error=relative_error(lost, exact),
            turned=False,
        )


class _Fit(NamedTuple):
    """B (out, r), A (r, in), and the squared Frobenius norms of M - B A and of M."""

    b: Tensor
    a: Tensor
    lost: float
    exact: float


def _fit_stack(stack: list[Factors], b: Tensor, a: Tensor) -> _Fit:
    away = from_means(stack, b, a)
    target = torch.zeros_like(b)
    for one in away:
        target.addmm_(one.b, one.a @ a.mT, alpha=one.weight)
    step = _solved(target, a)
    lost = energy_of([*away, Factors("", 1.0, -step, a)])
    return _Fit(b + step, a, lost, energy_of(stack))


def _fit(product: ProductSum, total: float, b: Tensor, a: Tensor) -> _Fit:
    mean = product.mean(total)
    missed = mean - b @ a
    step = _solved(missed @ a.mT, a)
    return _Fit(b + step, a, energy_of(missed.addmm_(step, a, alpha=-1)), energy_of(mean))


def _solved(target: Tensor, a: Tensor) -> Tensor:
    """X (out, r) of X (A A^T + lambda I) = target; zero if A is zero."""
    gram = a @ a.mT
    size = float(gram.diagonal().mean()) or 1.0
    gram.diagonal().add_(_PULL * size)
    return torch.cholesky_solve(target.mT, torch.linalg.cholesky(gram)).mT
