"""The best rank-r cut of mean products, B A = the first r terms of M = U S V^T.

From stacked factors M = L R is never formed: see `stack_svd`.

From M itself a block Krylov space finds the r strongest directions (Musco and Musco, Randomized
Block Krylov Methods, arXiv 1504.05477): the best r in the span of M X, (M M^T) M X, ..., with X
random from a fixed seed. They count if M V = U S up to 1e-6 of the largest singular value. If
not, where the singular values have no drop to speak of near the r-th, the eigenvectors of
M M^T take their place. Either way the SVD of the r rows W^T M, W the directions found, gives
S and V at the full precision of M, which squaring M alone would halve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import pairs
from flap_nvflare.aggregation.products import Factors
from flap_nvflare.aggregation.stack_svd import Basis, StackSvd

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


def cut_stack(stack: Sequence[Factors], gauge: str, rank: int = 0) -> Cut:
    """The cut of one adapter from the factors of all sites, their weights adding up to 1.

    Args:
        stack: the factors.
        gauge: see `svd`; `aligned` is `balanced` here, for `gauge.in_gauge` to turn.
        rank: r; 0 for the largest among the stack.
    """
    return cut_svd(StackSvd.of(stack), gauge, rank or max(one.a.shape[0] for one in stack))


def cut_svd(svd: StackSvd, gauge: str, rank: int) -> Cut:
    """The cut from the decomposition of the stacked factors; arguments as in `cut_stack`."""
    kept = min(rank, len(svd.s))
    u, v = svd.vectors(0, kept)
    b, a, live = _in_gauge(u, svd.s[:kept], v, rank, gauge)
    if live < rank:
        a[live:] = _spare(svd.vh[:live].mT, svd.right_small, svd.right, rank - live)
    squares = svd.s.square()
    return Cut(b, a, float(squares[live:].sum()), float(squares.sum()))


def strongest_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter with the same products, their singular values in falling order.

    So the first rows of A and columns of B are the best adapter of a smaller rank.
    """
    ordered = dict(tensors)
    for pair in pairs(tensors):
        one = Factors("", 1.0, tensors[pair.b], tensors[pair.a])
        done = cut_stack([one], "balanced")
        ordered[pair.a] = done.a.to(one.a.dtype).contiguous()
        ordered[pair.b] = done.b.to(one.b.dtype).contiguous()
    return ordered


def cut_product(product: Tensor, factor: Tensor, gauge: str, rank: int = 0) -> Cut:
    """The cut of one adapter from its mean product.

    Args:
        product: M, (out, in), float64.
        factor: mean of the sites' A, (n, in), for the directions that M does not have.
        gauge: see `cut_stack`.
        rank: r; 0 for n.
    """
    rank = rank or factor.shape[0]
    u, s, v = _strongest(product, min(rank, *product.shape))
    b, a, live = _in_gauge(u, s, v, rank, gauge)
    if live < rank:
        basis, small = Basis.of(torch.cat([v[:, :live], factor.mT], dim=1))
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
    on_b, on_a = (alive.double(), strength) if gauge == "paper" else (strength.sqrt(),) * 2
    b = _padded(u * (sign * on_b), rank, dim=1)
    a = _padded(v.mT * (sign * on_a)[:, None], rank, dim=0)
    return b, a, int(alive.sum())


def _signs(columns: Tensor) -> Tensor:
    """+1 or -1 by column: what makes its entry of largest magnitude (the first) positive."""
    largest = columns.abs().argmax(dim=0, keepdim=True)
    return torch.where(columns.gather(0, largest)[0] < 0, -1.0, 1.0).to(columns.dtype)


def _padded(matrix: Tensor, size: int, dim: int) -> Tensor:
    """Zeros added along `dim` up to `size`: a rank above both sides has nothing to hold."""
    shape = list(matrix.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim) if shape[dim] else matrix


def _spare(used: Tensor, small: Tensor, basis: Basis, count: int) -> Tensor:
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
