"""Which slices an epoch shows, and what each draw brings along.

Everything random of a draw is decided where it is drawn, in the training's own process: a worker
only carries it out, however old its copy of the data set.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Sampler

from flap_nvflare.data.errors import DataError


class Draw(int):
    """The index of a slice with what the sampler knows of this draw.

    It stays a draw when a `ConcatDataset` subtracts the offset of the part it belongs to.

    Attributes:
        number: how often the sampler has drawn before in this round.
        seed: of the round's augmentation.
        weight: uniform probability of the slice over that of this draw; None without weights.
    """

    number: int
    seed: int
    weight: float | None

    def __new__(cls, index: int, number: int, seed: int = 0, weight: float | None = None) -> Draw:
        draw = super().__new__(cls, index)
        draw.number, draw.seed, draw.weight = number, seed, weight
        return draw

    def __sub__(self, offset: int) -> Draw:
        return Draw(int(self) - offset, self.number, self.seed, self.weight)

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int, int, float | None]]:
        return Draw, (int(self), self.number, self.seed, self.weight)


class ForegroundSampler(Sampler[int]):
    """Slices in random order, a given share of them with foreground.

    An epoch has (slices with foreground) / `fraction` draws, at most the number of slices. The
    number of foreground draws is `fraction` of that, rounded up or down at random so that its
    expectation is exact. Within an epoch a slice comes again only when all slices of its kind
    have come. Every epoch goes on where the last one left the generator, until `begin`.

    With `weighted`, a draw's weight is the uniform probability of its slice, 1 / N, over the
    one it is drawn with: of N slices, F with foreground, a share f of the draws,

        w = (F / N) / f with foreground, (1 - F / N) / (1 - f) without; 1 in expectation.

    Args:
        shows_foreground: whether each slice shows foreground.
        fraction: expected share of draws with foreground, 0 to 1; 1 if every slice shows it.
        seed: of the generator in the first round.
        weighted: whether draws carry a weight.
        ends: where each joined data set ends, for `begin`.

    Raises:
        DataError: if `fraction` is not from 0 to 1, or asks for slices of which there are none,
            or if slices that are never drawn should have a weight.
    """

    def __init__(
        self,
        shows_foreground: Sequence[bool],
        fraction: float,
        seed: int,
        weighted: bool = False,
        ends: Sequence[int] = (),
    ) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise DataError(f"foreground_fraction is {fraction!r}; give a number from 0 to 1")
        shows = torch.as_tensor(list(shows_foreground), dtype=torch.bool)
        self._foreground = torch.nonzero(shows).flatten()
        self._background = torch.nonzero(~shows).flatten()
        if fraction > 0 and not len(self._foreground):
            raise DataError(
                f"none of {len(shows)} slices shows foreground, but foreground_fraction is "
                f"{fraction}; check the masks of the training cases"
            )
        self._fraction = fraction if len(self._background) else 1.0
        self._length = len(shows)
        if self._fraction > 0:
            self._length = min(self._length, round(len(self._foreground) / self._fraction))
        self._weights: tuple[float | None, float | None]
        self._weights = self._find_weights() if weighted else (None, None)
        self._shows = shows.tolist()
        self._ends = list(ends) or [len(shows)]
        self._generator = torch.Generator()
        self.begin(seed)

    def begin(self, seed: int, augment_seeds: Sequence[int] = ()) -> None:
        """Starts a round.

        Args:
            seed: of the generator.
            augment_seeds: seed of the augmentation, one for each joined data set; 0 without.
        """
        self._generator.manual_seed(seed)
        self._augment_seeds = list(augment_seeds) or [0] * len(self._ends)
        self._drawn = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        expected = self._length * self._fraction
        extra = torch.rand((), generator=self._generator).item() < expected % 1
        foreground = int(expected) + int(extra)
        drawn = torch.cat(
            [
                self._pick(self._foreground, foreground),
                self._pick(self._background, self._length - foreground),
            ]
        )
        order = torch.randperm(len(drawn), generator=self._generator)
        first = self._drawn
        # At once: how far ahead of the training a loader asks depends on its workers.
        self._drawn += len(drawn)
        for number, index in enumerate(drawn[order].tolist(), first):
            seed = self._augment_seeds[bisect_right(self._ends, index)]
            yield Draw(index, number, seed, self._weights[self._shows[index]])

    def _find_weights(self) -> tuple[float | None, float | None]:
        """The weight of a draw without and with foreground."""
        share = len(self._foreground) / (len(self._foreground) + len(self._background))
        if (self._fraction == 0 and share > 0) or (self._fraction == 1 and share < 1):
            raise DataError(
                f"foreground_fraction is {self._fraction:g}: slices that are never drawn cannot be "
                f"weighted; give loss_weighting 'none' or a fraction between 0 and 1"
            )
        without = (1 - share) / (1 - self._fraction) if self._fraction < 1 else None
        return without, share / self._fraction if self._fraction > 0 else None

    def _pick(self, indices: Tensor, count: int) -> Tensor:
        """`count` of `indices`, as evenly as possible."""
        picked = [indices[:0]]
        while count > 0:
            order = torch.randperm(len(indices), generator=self._generator)[:count]
            picked.append(indices[order])
            count -= len(order)
        return torch.cat(picked)


def foreground_sampler(
    dataset: Dataset[Any],
    foreground_fraction: float,
    seed: int,
    weighted: bool = False,
) -> ForegroundSampler:
    """The sampler of a `SliceDataset` or of a `ConcatDataset` of them."""
    parts: list[Any] = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    shows = [shown for part in parts for shown in part.shows_foreground]
    ends = list(accumulate(len(part) for part in parts))
    return ForegroundSampler(shows, foreground_fraction, seed, weighted, ends)
