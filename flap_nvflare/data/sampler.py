"""Which training slices an epoch shows, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from flap_nvflare.data.kits import DataError


class Draw(int):
    """A slice's index that also says how many slices the sampler drew before it.

    A slice drawn twice gets two different random views, whichever worker loads it. Torch's
    `ConcatDataset` subtracts offsets from an index, so a difference keeps the draw.
    """

    draw: int

    def __new__(cls, index: int, draw: int = 0) -> Draw:
        value = super().__new__(cls, index)
        value.draw = draw
        return value

    def __sub__(self, other: int) -> Draw:
        return Draw(int(self) - int(other), self.draw)

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int]]:
        return Draw, (int(self), self.draw)


class ForegroundSampler(Sampler[int]):
    """Draws an expected share of slices that show foreground.

    An epoch has (foreground slices) / (fraction) draws, at most the number of slices, at least
    one: below that cap every foreground slice is seen exactly once and the rest are different
    background slices. A share that is no whole number of slices is rounded at random, so that
    it holds in expectation. Each kind is drawn without repetition until it is used up. A second
    pass goes on where the generator stopped.

    Args:
        foreground: (N,) bool, which slices show foreground.
        fraction: expected share, from 0 to 1.
        seed: seed of the drawing.
    """

    def __init__(self, foreground: Tensor, fraction: float, seed: int = 0) -> None:
        if not 0 <= fraction <= 1:
            raise DataError(f"foreground_fraction {fraction!r} is not in [0, 1]")
        self.shown = torch.nonzero(foreground).flatten()
        self.empty = torch.nonzero(~foreground).flatten()
        self.fraction = fraction
        if fraction > 0 and not len(self.shown):
            raise DataError(
                f"none of {len(foreground)} training slices shows foreground; check the masks "
                "or set foreground_fraction to 0"
            )
        if fraction == 0 and not len(self.empty):
            raise DataError("every training slice shows foreground; raise foreground_fraction")
        total = len(foreground)
        self.length = min(total, max(1, round(len(self.shown) / fraction))) if fraction else total
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        chance = float(torch.rand(1, generator=self._generator))
        count = int(self.length * self.fraction + chance)
        if not len(self.empty):
            count = self.length
        order = torch.cat(
            [self._pick(self.shown, count), self._pick(self.empty, self.length - count)]
        )
        order = order[torch.randperm(self.length, generator=self._generator)]
        first, self._drawn = self._drawn, self._drawn + self.length
        for number, index in enumerate(order.tolist()):
            yield Draw(index, first + number)

    def _pick(self, indices: Tensor, count: int) -> Tensor:
        """`count` of `indices`, each as often as any other, give or take one."""
        picked = indices.new_empty(0)
        while len(picked) < count:
            turn = indices[torch.randperm(len(indices), generator=self._generator)]
            picked = torch.cat([picked, turn])[:count]
        return picked
