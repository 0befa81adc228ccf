"""The smallest factors that hold a sum of products to a given share of its energy.

The energy of a matrix is its squared Frobenius norm, the sum of its squared singular values.
Of all matrices of rank q the first q terms of the SVD keep the most (Eckart and Young); the cut
of a residual by its energy is that of FLoRIST (arXiv 2506.09199).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flap_nvflare.aggregation.products import Factors, ProductSum, side_by_side
from flap_nvflare.aggregation.rule import AggregationError
from flap_nvflare.aggregation.stack_svd import StackSvd

# What is lost of a matrix if the float32 numbers beside which it counts can't resolve it.
_RESOLUTION = 2.0**-23

Terms = Sequence[Factors] | Tensor
"""A sum of weighted products: stacked factors, or the matrix itself in float64."""


class Shortened(NamedTuple):
    """The smallest factors of a matrix X.

    Attributes:
        b: (out, q).
        a: (q, in).
        lost: squared Frobenius norm of X - B A.
    """

    b: Tensor
    a: Tensor
    lost: float


def factors_of(
    tensors: Mapping[str, Tensor], stem: str, suffix: str, shape: tuple[int, int]
) -> list[Factors]:
    """The product `<stem>.<suffix>_b` `<stem>.<suffix>_a` of an earlier round, if there is one.

    Raises:
        AggregationError: if one factor is missing, or they do not fit to `shape` (out, in).
    """
    names = [f"{stem}.{suffix}_b", f"{stem}.{suffix}_a"]
    b, a = (tensors.get(name) for name in names)
    if b is None and a is None:
        return []
    if b is None or a is None or (b.shape[0], a.shape[1]) != shape or b.shape[1] != a.shape[0]:
        found = [None if x is None else tuple(x.shape) for x in (b, a)]
        raise AggregationError(
            f"{names[0]!r} is {found[0]}, {names[1]!r} is {found[1]}; expected (out, q) and "
            f"(q, in) for a product of {shape}: go on from the adapter that they belong to",
            names[0],
        )
    return [Factors("", 1.0, b, a)]


def mean_of(product: ProductSum, total: float, shares: Mapping[str, float]) -> Terms:
    """The mean product of all sites.

    Args:
        product: the sites' products.
        total: sum of the sites' weights.
        shares: the sites' shares of it.
    """
    stack = product.stack(shares)
    return product.mean(total) if stack is None else stack


def shape_of(terms: Terms) -> tuple[int, int]:
    """(out, in) of the matrix."""
    if isinstance(terms, Tensor):
        return terms.shape[0], terms.shape[1]
    return terms[0].b.shape[0], terms[0].a.shape[1]


def extended(terms: Terms, extra: Sequence[Factors]) -> Terms:
    """The sum with further products, stacked while that is cheaper; `terms` stays as it is."""
    if not extra:
        return terms
    if not isinstance(terms, Tensor) and stays_stacked([*terms, *extra]):
        return [*terms, *extra]
    whole = matrix_of(terms)
    for one in extra:
        whole = torch.addmm(whole, one.b.double() * one.weight, one.a.double())
    return whole


def stays_stacked(stack: Sequence[Factors]) -> bool:
    """Whether the cut of the stack costs less than that of its matrix; see `products`."""
    return 2 * sum(one.a.shape[0] for one in stack) <= min(shape_of(stack))


def matrix_of(terms: Terms) -> Tensor:
    """The sum as a matrix (out, in), float64."""
    if isinstance(terms, Tensor):
        return terms
    left, right = side_by_side(terms)
    return left @ right


def energy_of(terms: Terms) -> float:
    """Squared Frobenius norm of a sum of products."""
    if isinstance(terms, Tensor):
        return float(terms.square().sum())
    return square_of(*side_by_side(terms))


def square_of(left: Tensor, right: Tensor) -> float:
    """Squared Frobenius norm of L R, from Gram matrices of the side of the rank alone.

    |L R|^2 = trace(R^T L^T L R) = sum of (L^T L) * (R R^T), entry by entry.
    """
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)


def shortened(terms: Terms, energy: float, beside: float) -> Shortened:
    """The smallest factors that keep a share of the energy of X.

    Args:
        terms: X.
        energy: the share, in (0, 1].
        beside: squared norm of the matrices beside which X counts: what float32 can't resolve
            beside them is dropped even with energy 1.
    """
    if isinstance(terms, Tensor):
        return _shortened_matrix(terms, energy, beside)
    svd = StackSvd.of(terms)
    squares = svd.s.square()
    kept = kept_terms(squares, energy, beside)
    return Shortened(*svd.terms(0, kept), float(squares[kept:].sum()))


def kept_terms(squares: Tensor, energy: float, beside: float) -> int:
    """How many of the squared singular values, largest first, must be kept.

    Args:
        squares: (m,).
        energy: share of their sum to keep.
        beside: see `shortened`.
    """
    tails = squares.flip(0).cumsum(0)  # of the last 1, 2, ... values
    return len(squares) - int((tails <= _allowed(float(squares.sum()), energy, beside)).sum())


def _allowed(whole: float, energy: float, beside: float) -> float:
    """The squared norm that may be lost of a matrix whose own is `whole`."""
    return max((1.0 - energy) * whole, _RESOLUTION**2 * beside)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype)


def _shortened_matrix(matrix: Tensor, energy: float, beside: float) -> Shortened:
    """The cut within the eigenvectors W of X X^T, X the matrix or its transpose.

    W W^T X = X, so that the rows of W^T X say what each direction holds. Their lengths are the
    singular values to 1.5e-8 of the largest, where the eigenvalues' roots would be noise.

    If not even the weakest direction may be dropped, W is the identity. X X^T - t I has a Cholesky
    factor just then, t what may be lost, and that costs a twentieth of the eigenvectors. It is
    the usual case of an offset that has grown over many rounds, and of many sites.
    """
    if matrix.shape[0] > matrix.shape[1]:
        b, a, lost = _shortened_matrix(matrix.mT, energy, beside)
        return Shortened(a.mT, b.mT, lost)
    # Entries of at most 1: squares neither overflow nor vanish.
    scale = float(matrix.abs().max()) or 1.0
    scaled = matrix / scale
    gram = scaled @ scaled.mT
    allowed = _allowed(float(gram.trace()), energy, beside / scale / scale)
    if not torch.linalg.cholesky_ex(gram - allowed * _identity(gram)).info:
        return Shortened(_identity(gram), matrix, 0.0)
    found = torch.linalg.eigh(gram)[1].flip(1)
    rows = found.mT @ matrix
    squares = rows.square().sum(dim=1)
    kept = kept_terms(squares, energy, beside)
    return Shortened(found[:, :kept], rows[:kept], float(squares[kept:].sum()))
