"""Sums of tensors whose bits do not depend on the order of the addends, in fixed memory.

A float sum rounds after every addend, so its last digits depend on the order. Here every
addend is first cut into pieces that are whole multiples of fixed grids (Demmel and Nguyen,
Fast Reproducible Floating-Point Summation, ARITH 2013; Ahrens, Demmel and Nguyen, Algorithms
for Efficient Reproducible Floating Point Summation, ACM TOMS 46(3), 2020). Level l has the
grid g_l = 2^(36 l). With the big constant M_l = 1.5 * 2^52 g_l, a float64 number near M_l has
exactly the spacing g_l, so

    h = (c + M_l) - M_l        is c rounded to a multiple of g_l, and
    c - h                      is what is left for level l - 1; |c - h| <= g_l / 2.

A level adds up its pieces h. Each is at most g_(l+1) / 2 = 2^35 g_l, so 2^18 of them stay
below 2^53 g_l, where float64 holds every multiple of g_l: the sums are exact, and exact sums
have no order.

Only the topmost levels are kept. The top is the lowest level with g_(l+1) / 2 above all
addends so far; when a larger addend moves it up, levels are dropped at the bottom. An addend
that came before is rounded to zero on the new levels, and its pieces on the levels that stay
are the same as if it came afterwards. So the window, too, depends on the addends alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Bits between two levels.
_STEP = 36
# Below this level the grid would be finer than the numbers that float64 has.
_LOWEST = -29

LIMIT = 2.0**970
"""Largest magnitude of an addend: above it M of the level would overflow."""

MOST = 2 ** (54 - _STEP)
"""Largest number of addends: with more, a level's sum might not be exact."""


class ExactSum:
    """The sum of float64 tensors of one shape, equal bit for bit in every order.

    Memory: `levels` float64 tensors of the addends' shape, whatever their number. An entry of
    an addend loses at most 2^-(36 (levels - 1)) of the largest magnitude among all entries of
    all addends: 2e-22 with three levels, far below what float64 itself rounds off, and 1.5e-11
    with two. (Below 2^-1045, near the end of float64, nothing is kept.)

    Args:
        levels: grids kept.
    """

    def __init__(self, levels: int = 3) -> None:
        if levels < 1:
            raise ValueError(f"levels: {levels!r} is not allowed; expected 1 or more")
        self._count = levels
        self._top = _LOWEST + levels - 1
        self._sums: list[Tensor] = []  # from the top level down
        self._addends = 0

    def add(self, addend: Tensor) -> None:
        """Adds a tensor.

        Args:
            addend: float64; it is used as work space and holds nothing of use afterwards.

        Raises:
            ValueError: if there are `MOST` addends already, or an entry is not finite or
                above `LIMIT`; the sum is as before.
        """
        if self._addends == MOST:
            raise ValueError(f"{MOST} addends are the most that can be summed exactly")
        largest = float(torch.linalg.vector_norm(addend, math.inf)) if addend.numel() else 0.0
        if not largest <= LIMIT:
            raise ValueError(f"an addend of {largest:g}; expected at most {LIMIT:.3g}")
        self._make_room(addend, largest)
        self._addends += 1
        piece = torch.empty_like(addend)
        for depth, total in enumerate(self._sums):
            big = 1.5 * 2.0 ** (52 + _STEP * (self._top - depth))
            torch.add(addend, big, out=piece)
            total.add_(piece.sub_(big))
            addend.sub_(piece)

    def total(self) -> Tensor:
        """The sum in float64, rounded from the smallest level up.

        Raises:
            ValueError: if nothing was added.
        """
        if not self._sums:
            raise ValueError("no addend; add at least one")
        total = self._sums[-1].clone()
        for level in reversed(self._sums[:-1]):
            total.add_(level)
        return total

    def _make_room(self, addend: Tensor, largest: float) -> None:
        """Moves the top up to the level whose next grid is above twice `largest`."""
        if not self._sums:
            self._sums = [torch.zeros_like(addend) for _ in range(self._count)]
        exponent = math.frexp(largest)[1]  # largest < 2^exponent; 0 for a sum of zeros
        top = -(-(exponent + 1) // _STEP) - 1
        if largest and top > self._top:
            fresh = min(top - self._top, self._count)
            rest = self._sums[: self._count - fresh]
            self._sums = [torch.zeros_like(addend) for _ in range(fresh)] + rest
            self._top = top
