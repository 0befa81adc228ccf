"""The best rank-r cut of mean products, B A = the first r terms of M = U S V^T.

From stacked factors M = L R is never formed: L = Q_L T_L and R^T = Q_R T_R leave the SVD of
the small matrix T_L T_R^T, whose side is at most k r. Q_L and Q_R stay products of reflectors:
only their product with the r vectors that are kept is formed.

From M itself a block Krylov space finds the r strongest directions (Musco and Musco, Randomized
Block Krylov Methods, arXiv 1504.05477): the best r in the span of M X, (M M^T) M X, ..., with X
random from a fixed seed. They count if M V = U S up to 1e-6 of the largest singular value. If
not, where the singular values have no drop to speak of near the r-th, the eigenvectors of
M M^T take their place. Either way the SVD of the r rows W^T M, W the directions found, gives
S and V at the full precision of M, which squaring M alone would halve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flap_nvflare.aggregation.products import Factors, side_by_side

# A singular value below the float32 resolution of the largest is rounding, no direction.
_RESOLUTION = 2.0**-23
# Blocks of the Krylov space, and what M V - U S may be of the largest singular value.
_BLOCKS = 5
_RESIDUAL = 1e-6


class Cut(NamedTuple):
    """The cut of one product.

    Attributes:
        b: (out, r).
        a: (r, in).
        lost: squared Frobenius norm of M - B A.
        exact: squared Frobenius norm of M.
    """

    b: Tensor
    a: Tensor
    lost: float
    exact: float


def cut_stack(stack: Sequence[Factors], gauge: str) -> Cut:
    """The cut of one adapter from the factors of all sites, their weights adding up to 1."""
    rank = stack[0].a.shape[0]
    left, right = side_by_side(stack)
    left_basis, left_small = _Basis.of(left)
    right_basis, right_small = _Basis.of(right.mT)
    u, s, vh = torch.linalg.svd(left_small @ right_small.mT, full_matrices=False)
    kept = min(rank, len(s))
    b, a, live = _in_gauge(
        left_basis.out(u[:, :kept]), s[:kept], right_basis.out(vh[:kept].mT), rank, gauge
    )
    if live < rank:
        a[live:] = _spare(vh[:live].mT, right_small, right_basis, rank - live)
    squares = s.square()
    return Cut(b, a, float(squares[live:].sum()), float(squares.sum()))


def cut_product(product: Tensor, factor: Tensor, gauge: str) -> Cut:
    """The cut of one adapter from its mean product.

    Args:
        product: M, (out, in), float64.
        factor: mean of the sites' A, (rank, in), for the directions that M does not have.
        gauge: see `svd`.
    """
    rank = factor.shape[0]
    u, s, v = _strongest(product, min(rank, *product.shape))
    b, a, live = _in_gauge(u, s, v, rank, gauge)
    if live < rank:
        basis, small = _Basis.of(torch.cat([v[:, :live], factor.mT], dim=1))
        a[live:] = _spare(small[:, :live], small[:, live:], basis, rank - live)
    cut = (u[:, :live] * s[:live]) @ v[:, :live].mT
    return Cut(b, a, float((product - cut).square().sum()), float(product.square().sum()))


def _strongest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, count), S and V (in, count) of the largest singular values."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = _strongest(matrix.mT, count)
        return u, s, v
    # Entries of at most 1: squares neither overflow nor vanish.
    scale = float(matrix.abs().max()) or 1.0
    scaled = matrix / scale
    width = count + (count + 1) // 2
    # Of a small matrix all eigenvectors cost less than the Krylov space.
    if 2 * _BLOCKS * width <= matrix.shape[0]:
        u, s, v = _turned(scaled, _krylov(scaled, width), count)
        if float((scaled @ v - u * s).norm()) <= _RESIDUAL * float(s[0]):
            return u, s * scale, v
    u, s, v = _turned(scaled, None, count)
    return u, s * scale, v


def _krylov(matrix: Tensor, width: int) -> Tensor:
    """Orthonormal basis (out, blocks * width) of the block Krylov space."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    blocks = [torch.linalg.qr(matrix @ start)[0]]
    while len(blocks) < _BLOCKS:
        blocks.append(torch.linalg.qr(matrix @ (matrix.mT @ blocks[-1]))[0])
    return torch.linalg.qr(torch.cat(blocks, dim=1))[0]


def _turned(matrix: Tensor, basis: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The strongest directions of the matrix within a basis; within the whole space if None."""
    inside = matrix if basis is None else basis.mT @ matrix
    found = torch.linalg.eigh(inside @ inside.mT)[1][:, len(inside) - count :]
    if basis is not None:
        found = basis @ found
    turn, s, vh = torch.linalg.svd(found.mT @ matrix, full_matrices=False)
    return found @ turn, s, vh.mT


def _in_gauge(u: Tensor, s: Tensor, v: Tensor, rank: int, gauge: str) -> tuple[Tensor, Tensor, int]:
    """B (out, rank), A (rank, in), and how many of the kept directions M has: the first ones."""
    sign = _signs(u)
    alive = s > _RESOLUTION * s[:1]
    strength = torch.where(alive, s, 0.0)
    on_b, on_a = (strength.sqrt(),) * 2 if gauge == "balanced" else (alive.double(), strength)
    b = _padded(u * (sign * on_b), rank, dim=1)
    a = _padded(v.mT * (sign * on_a)[:, None], rank, dim=0)
    return b, a, int(alive.sum())


@dataclass(frozen=True)
class _Basis:
    """Q (m, q) of a QR decomposition, kept as Householder reflectors."""

    reflectors: Tensor
    scales: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> tuple[_Basis, Tensor]:
        """Q and T of a matrix (m, n) = Q T, with T (q, n) and q = min(m, n)."""
        packed, scales = torch.geqrf(matrix)
        size = len(scales)
        return cls(packed[:, :size], scales), packed[:size].triu()

    def out(self, coordinates: Tensor) -> Tensor:
        """Q C of coordinates C (q, c)."""
        rows = len(self.reflectors)
        return torch.ormqr(self.reflectors, self.scales, _padded(coordinates, rows, dim=0))


def _signs(columns: Tensor) -> Tensor:
    """+1 or -1 by column: what makes its entry of largest magnitude (the first) positive."""
    largest = columns.abs().argmax(dim=0, keepdim=True)
    return torch.where(columns.gather(0, largest)[0] < 0, -1.0, 1.0).to(columns.dtype)


def _padded(matrix: Tensor, size: int, dim: int) -> Tensor:
    """Zeros added along `dim` up to `size`: a rank above both sides has nothing to hold."""
    shape = list(matrix.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim) if shape[dim] else matrix


def _spare(used: Tensor, small: Tensor, basis: _Basis, count: int) -> Tensor:
    """Rows of A for directions that the mean product does not have.

    Args:
        used: the directions already set, (q, n) in the coordinates of `basis`.
        small: T_R of R^T = Q_R T_R, (q, k r).
        basis: Q_R, (in, q).
        count: rows wanted.

    Returns:
        (count, in): orthogonal rows, strongest first; zero rows only if there are more rows
        wanted than directions left.
    """
    free = torch.linalg.qr(used, mode="complete")[0][:, used.shape[1] :]
    vectors, lengths, _ = torch.linalg.svd(free.mT @ small)
    # A direction in which no site has an A row gets the length of a typical row.
    typical = float(small.square().sum().div(used.shape[1] + count).sqrt()) or 1.0
    scale = vectors.new_full((vectors.shape[1],), typical)
    scale[: len(lengths)] = torch.where(lengths > _RESOLUTION * typical, lengths, typical)
    columns = basis.out(free @ vectors[:, :count])
    rows = (columns * _signs(columns) * scale[: columns.shape[1]]).mT
    return _padded(rows, count, dim=0)
