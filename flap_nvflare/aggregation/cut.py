"""The best rank-r cut of mean products, B A = the first r terms of M = U S V^T.

From stacked factors M = L R is never formed: L = Q_L T_L and R^T = Q_R T_R leave the SVD of
the small matrix T_L T_R^T, whose side is at most k r. Q_L and Q_R stay products of reflectors:
only their product with the r vectors that are kept is formed.

From M itself the r strongest eigenvectors W of M M^T (of M^T M if M is tall) are found, and no
others; they hold U up to a turn. The SVD of W^T M, r rows, turns them and gives S and V at the
full precision of M, which squaring M alone would halve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.linalg import eigh
from torch import Tensor

from flap_nvflare.aggregation.products import Factors, side_by_side

# A singular value below the float32 resolution of the largest is rounding, no direction.
_RESOLUTION = 2.0**-23


class Cut(NamedTuple):
    """The cut of n products.

    Attributes:
        b: (n, out, r).
        a: (n, r, in).
        lost: squared Frobenius norm of all M - B A together.
        exact: squared Frobenius norm of all M together.
    """

    b: Tensor
    a: Tensor
    lost: float
    exact: float


def cut_stacks(stacks: Sequence[Sequence[Factors]], gauge: str) -> Cut:
    """The cuts of n adapters of equal shapes, each from the factors of all sites."""
    sides = [side_by_side(stack) for stack in stacks]
    left = torch.stack([side[0] for side in sides])
    right = torch.stack([side[1] for side in sides])
    rank = stacks[0][0].a.shape[0]
    left_basis, left_small = _Basis.of(left)
    right_basis, right_small = _Basis.of(right.mT)
    u, s, vh = torch.linalg.svd(left_small @ right_small.mT, full_matrices=False)
    kept = min(rank, s.shape[1])
    b, a, alive = _in_gauge(
        left_basis.out(u[:, :, :kept]),
        s[:, :kept],
        right_basis.out(vh[:, :kept].mT),
        rank,
        gauge,
    )
    for index in (alive.sum(dim=1) < rank).nonzero().flatten().tolist():
        count = int(alive[index].sum())
        a[index, count:] = _spare(
            vh[index, :count].mT, right_small[index], right_basis.one(index), rank - count
        )
    squares = s.square()
    lost = float(squares[:, kept:].sum() + squares[:, :kept][~alive].sum())
    return Cut(b, a, lost, float(squares.sum()))


def cut_product(product: Tensor, factor: Tensor, gauge: str) -> Cut:
    """The cut of one adapter from its mean product.

    Args:
        product: M, (out, in), float64.
        factor: mean of the sites' A, (rank, in), for the directions that M does not have.
        gauge: see `svd`.
    """
    rank = factor.shape[0]
    u, s, v = _strongest(product, min(rank, *product.shape))
    b, a, alive = _in_gauge(u[None], s[None], v[None], rank, gauge)
    count = int(alive.sum())
    if count < rank:
        basis, small = _Basis.of(torch.cat([v[:, :count], factor.mT], dim=1))
        a[0, count:] = _spare(small[:, :count], small[:, count:], basis, rank - count)
    cut = (u[:, :count] * s[:count]) @ v[:, :count].mT
    return Cut(b, a, float((product - cut).square().sum()), float(product.square().sum()))


def _strongest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, count), S and V (in, count) of the largest singular values."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = _strongest(matrix.mT, count)
        return u, s, v
    side = matrix.shape[0]
    # Entries of at most 1: squares neither overflow nor vanish.
    scaled = matrix / (float(matrix.abs().max()) or 1.0)
    _, vectors = eigh(
        (scaled @ scaled.mT).numpy(),
        subset_by_index=(side - count, side - 1),
        overwrite_a=True,
        check_finite=False,
    )
    basis = torch.from_numpy(vectors)
    turn, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ turn, s, vh.mT


def _in_gauge(
    u: Tensor, s: Tensor, v: Tensor, rank: int, gauge: str
) -> tuple[Tensor, Tensor, Tensor]:
    """B (n, out, rank), A (n, rank, in), and which of the kept directions (n, kept) M has."""
    sign = _signs(u)
    alive = s > _RESOLUTION * s[:, :1]
    strength = torch.where(alive, s, 0.0)
    on_b, on_a = (strength.sqrt(),) * 2 if gauge == "balanced" else (alive.double(), strength)
    b = _padded(u * (sign * on_b)[:, None, :], rank, dim=2)
    a = _padded(v.mT * (sign * on_a)[:, :, None], rank, dim=1)
    return b, a, alive


@dataclass(frozen=True)
class _Basis:
    """Q (..., m, q) of a QR decomposition, kept as Householder reflectors."""

    reflectors: Tensor
    scales: Tensor

    @classmethod
    def of(cls, matrices: Tensor) -> tuple[_Basis, Tensor]:
        """Q and T of matrices (..., m, n) = Q T, with T (..., q, n) and q = min(m, n)."""
        packed, scales = torch.geqrf(matrices)
        size = scales.shape[-1]
        return cls(packed[..., :size], scales), packed[..., :size, :].triu()

    def one(self, index: int) -> _Basis:
        """The basis of one matrix of a stack."""
        return _Basis(self.reflectors[index], self.scales[index])

    def out(self, coordinates: Tensor) -> Tensor:
        """Q C of coordinates C (..., q, c)."""
        rows = self.reflectors.shape[-2]
        return torch.ormqr(self.reflectors, self.scales, _padded(coordinates, rows, dim=-2))


def _signs(columns: Tensor) -> Tensor:
    """+1 or -1 by column: what makes its entry of largest magnitude (the first) positive."""
    largest = columns.abs().argmax(dim=-2, keepdim=True)
    return torch.where(columns.gather(-2, largest).squeeze(-2) < 0, -1.0, 1.0).to(columns.dtype)


def _padded(matrices: Tensor, size: int, dim: int) -> Tensor:
    """Zeros added along `dim` up to `size`: a rank above both sides has nothing to hold."""
    shape = list(matrices.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([matrices, matrices.new_zeros(shape)], dim=dim) if shape[dim] else matrices


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
