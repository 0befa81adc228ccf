"""The SVD of a product of stacked factors, M = L R, that never forms M.

L = Q_L T_L and R^T = Q_R T_R leave the SVD of the small matrix T_L T_R^T, whose side is at most
the sum of the ranks. Q_L and Q_R stay products of reflectors: only their products with the
vectors that are asked for are formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flap_nvflare.aggregation.products import Factors, side_by_side


@dataclass(frozen=True)
class Basis:
    """Q (m, q) of a QR decomposition, kept as Householder reflectors."""

    reflectors: Tensor
    scales: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> tuple[Basis, Tensor]:
        """Q and T of a matrix (m, n) = Q T, with T (q, n) and q = min(m, n)."""
        packed, scales = torch.geqrf(matrix)
        size = len(scales)
        return cls(packed[:, :size], scales), packed[:size].triu()

    def out(self, coordinates: Tensor) -> Tensor:
        """Q C of coordinates C (q, c)."""
        missing = len(self.reflectors) - len(coordinates)
        below = coordinates.new_zeros((missing, coordinates.shape[1]))
        return torch.ormqr(self.reflectors, self.scales, torch.cat([coordinates, below]))


@dataclass(frozen=True)
class StackSvd:
    """M = (Q_L U) S (Q_R V)^T, all in float64.

    Attributes:
        left: Q_L, (out, p).
        right: Q_R, (in, q).
        right_small: T_R of R^T = Q_R T_R, (q, sum of ranks).
        u: U, (p, m).
        s: S, (m,), largest first.
        vh: V^T, (m, q).
    """

    left: Basis
    right: Basis
    right_small: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor

    @classmethod
    def of(cls, stack: Sequence[Factors]) -> StackSvd:
        """The decomposition of the sum of all weighted products of the stack."""
        left, right = side_by_side(stack)
        left_basis, left_small = Basis.of(left)
        right_basis, right_small = Basis.of(right.mT)
        u, s, vh = torch.linalg.svd(left_small @ right_small.mT, full_matrices=False)
        return cls(left_basis, right_basis, right_small, u, s, vh)

    def vectors(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Singular vectors `first` to `last` - 1: (out, n) and (in, n)."""
        u, vh = self.u[:, first:last], self.vh[first:last]
        return self.left.out(u), self.right.out(vh.mT)

    def terms(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """B (out, n) and A (n, in), equally strong, of the terms `first` to `last` - 1 of M."""
        u, v = self.vectors(first, last)
        root = self.s[first:last].sqrt()
        return u * root, (v * root).mT
