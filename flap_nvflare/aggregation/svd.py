"""Rule `svd`: the best rank-r cut of the exact mean product (FLAP-SAM, arXiv 2407.21739;
FlexLoRA, arXiv 2402.11505).

    M = sum_k w_k B_k A_k  =  U S V^T,      B A = the first r terms of U S V^T

Bytes up and down: one adapter a site each. Exact if M has rank r at most; otherwise the
closest matrix of rank r in the Frobenius norm (Eckart and Young), so never further from M
than the mean of the factors is. Heads and tokens: weighted mean, exact.

M itself is never formed. With the factors stacked, M = L R, L = [sqrt(w_k) B_k] (out, k r)
and R = [sqrt(w_k) A_k] (k r, in); L = Q_L T_L and R^T = Q_R T_R leave the SVD of the small
matrix T_L T_R^T, whose side is at most k r. Q_L and Q_R stay products of reflectors: only
their product with the r vectors that are kept is formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.rule import (
    Aggregate,
    AggregationError,
    Contribution,
    mean_tensor,
    pairs_of,
    prepared,
    relative_error,
)

GAUGES = ("balanced", "paper")

# A singular value below the float32 resolution of the largest is rounding, no direction.
_RESOLUTION = 2.0**-23
# Numbers in a stack of factors at a time: 128 MiB in float64.
_CHUNK = 2**24


def svd(contributions: Sequence[Contribution], gauge: str = "balanced") -> Aggregate:
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
    sites' own A factors that is orthogonal to the rows already set, at its own length. The
    product stays the same.

    The sign is fixed: the entry of largest magnitude of each left vector is positive.

    Args:
        contributions: updates of equal names and shapes.
        gauge: `balanced` or `paper`.

    Raises:
        AggregationError: if the contributions do not fit together or the gauge is unknown.
    """
    if gauge not in GAUGES:
        raise AggregationError(f"gauge {gauge!r} is not known; expected one of {GAUGES}")
    ordered = prepared(contributions)
    found = pairs_of(ordered)
    factors = {name for pair in found for name in (pair.a, pair.b)}
    tensors = {
        name: mean_tensor(ordered, name) for name in ordered[0].tensors if name not in factors
    }
    lost, exact = [], []
    for group in _alike(ordered, found):
        b, a, squares, exact_squares = _cut(ordered, group, gauge)
        for index, pair in enumerate(group):
            tensors[pair.a], tensors[pair.b] = a[index], b[index]
        lost.append(squares)
        exact.append(exact_squares)
    return Aggregate(
        tensors={
            # Dense copies: slices of a stack, or columns as rows, can't be sent.
            name: tensors[name].to(
                ordered[0].tensors[name].dtype, copy=True, memory_format=torch.contiguous_format
            )
            for name in sorted(tensors)
        },
        error=relative_error(math.fsum(lost), math.fsum(exact)),
        turned=bool(found),
    )


def _alike(contributions: Sequence[Contribution], found: Sequence[Pair]) -> Iterator[list[Pair]]:
    """The pairs in groups of equal shapes, small enough to stack."""
    tensors = contributions[0].tensors
    groups: dict[tuple[int, ...], list[Pair]] = {}
    for pair in found:
        groups.setdefault((*tensors[pair.b].shape, *tensors[pair.a].shape), []).append(pair)
    for (rows, rank, _, columns), group in groups.items():
        size = max(1, _CHUNK // (len(contributions) * rank * max(rows, columns)))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _cut(
    contributions: Sequence[Contribution], group: Sequence[Pair], gauge: str
) -> tuple[Tensor, Tensor, float, float]:
    """B (n, out, r) and A (n, r, in) of n pairs; squared norms of what is cut and of M."""
    left = _stacked(contributions, [pair.b for pair in group], dim=1)
    right = _stacked(contributions, [pair.a for pair in group], dim=0)
    rank = left.shape[2] // len(contributions)
    left_basis, left_small = _Basis.of(left)
    right_basis, right_small = _Basis.of(right.mT)
    u, s, vh = torch.linalg.svd(left_small @ right_small.mT, full_matrices=False)
    kept = min(rank, s.shape[1])
    b = left_basis.out(u[:, :, :kept])
    a = right_basis.out(vh[:, :kept].mT).mT
    sign = _signs(b)
    alive = s[:, :kept] > _RESOLUTION * s[:, :1]
    strength = torch.where(alive, s[:, :kept], 0.0)
    on_b, on_a = (strength.sqrt(),) * 2 if gauge == "balanced" else (alive.double(), strength)
    b = _padded(b * (sign * on_b)[:, None, :], rank, dim=2)
    a = _padded(a * (sign * on_a)[:, :, None], rank, dim=1)
    for index in (alive.sum(dim=1) < rank).nonzero().flatten().tolist():
        count = int(alive[index].sum())
        a[index, count:] = _spare(
            vh[index, :count].mT, right_small[index], right_basis.one(index), rank - count
        )
    squares = s.square()
    exact = float(squares.sum())
    return b, a, float(squares[:, kept:].sum() + squares[:, :kept][~alive].sum()), exact


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


def _stacked(contributions: Sequence[Contribution], names: Sequence[str], dim: int) -> Tensor:
    """sqrt(w_k) X_k of all sites side by side (`dim`), one matrix a name, in float64."""
    return torch.stack(
        [
            torch.cat(
                [
                    one.tensors[name].detach().double() * math.sqrt(one.weight)
                    for one in contributions
                ],
                dim=dim,
            )
            for name in names
        ]
    )


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
