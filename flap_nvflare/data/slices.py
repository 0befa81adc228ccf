"""Prepared cases as slices: drawn at random, changed at random, or one after the other.

Augmentation belongs to the draw, not to the order of calls: the same seed, slice and draw give the
same bytes whatever the number of workers, however old their copy of the data set.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Sampler

from flap_nvflare.data.errors import DataError

if TYPE_CHECKING:
    from flap_nvflare.data.prepared import Prepared

CHANNELS = ("repeat", "neighbours")


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


@dataclass(frozen=True)
class Views:
    """How drawn slices are changed.

    Attributes:
        count: 0 for a fresh change at every draw; n for n fixed views of every slice, one of
            them chosen by the draw, so that what is made of a view can be kept over rounds.
        seed: of the fixed views; the rounds have no part in them.
    """

    count: int = 0
    seed: int = 0


class SliceDataset(Dataset[dict[str, Any]]):
    """The slices of some cases, one after the other.

    An item holds `image` (3, S', S') float32, `label` (1, S', S') uint8, `case`, `slice`, `key`
    and, if the draw has one, `weight` () float32. `key` is a hash of all that decides the image,
    the same in every round and process; it is empty where every draw gives another image.

    Args:
        cases: prepared cases of one site.
        channels: `repeat` (the slice three times) or `neighbours` (slice before, slice, slice
            after in the order of the volume, the end slices repeated).
        views: random changes, see `flap_nvflare.data.augment`; None for the slices as they are.

    Attributes:
        shows_foreground: whether each slice has a label above 0.

    Raises:
        DataError: if there is no case.
        ValueError: on another `channels`.
    """

    def __init__(
        self, cases: Sequence[Prepared], channels: str = "repeat", views: Views | None = None
    ) -> None:
        if not cases:
            raise DataError("no volume to draw slices from; give the site at least one case")
        self._channels = _checked(channels)
        self._cases = list(cases)
        self._views = views
        self._places = [
            (number, index)
            for number, case in enumerate(cases)
            for index in range(len(case.images))
        ]
        self.shows_foreground = [
            bool(shows) for case in cases for shows in case.labels.flatten(start_dim=1).any(dim=1)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A slice by its index; a `Draw` also chooses the augmentation."""
        number, place = self._places[index]
        case = self._cases[number]
        image = case.images[_channel_slices(place, len(case.images), self._channels)]
        label = case.labels[place][None]
        key = slice_key(case, place, self._channels)
        if self._views is not None:
            from flap_nvflare.data.augment import VERSION, augment

            entropy = _entropy(self._views, case, place, index)
            image, label = augment(image, label, entropy)
            fixed = self._views.count > 0
            key = slice_key(case, place, self._channels, (VERSION, *entropy)) if fixed else ""
        item = {"image": image, "label": label, "case": case.name, "slice": place, "key": key}
        weight = getattr(index, "weight", None)
        return item if weight is None else {**item, "weight": torch.tensor(weight)}


def slice_key(case: Prepared, place: int, channels: str, view: Sequence[int] = ()) -> str:
    """Hash of all that decides the image of slice `place`; no `view` is the slice as it is."""
    text = f"{case.key}/{place}/{channels}/{tuple(view) or 'plain'}"
    return hashlib.sha256(text.encode()).hexdigest()


def _entropy(views: Views, case: Prepared, place: int, index: int) -> tuple[int, ...]:
    """What decides the change of this draw."""
    draw = (getattr(index, "seed", 0), int(index), getattr(index, "number", 0))
    if views.count == 0:
        return draw
    view = int(np.random.SeedSequence(draw).generate_state(1)[0]) % views.count
    name = int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:8], "big")
    return (views.seed, name, place, view)


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


def volume_batches(
    case: Prepared, channels: str, batch_size: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Every slice of a case once, in order, as (n, 3, S', S') float32 with n <= `batch_size`.

    Beside the images come the keys of their slices, those of `SliceDataset` without changes.

    Raises:
        ValueError: on another `channels` or a batch size below 1.
    """
    _checked(channels)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    count = len(case.images)
    for start in range(0, count, batch_size):
        places = range(start, min(start + batch_size, count))
        chosen = [_channel_slices(place, count, channels) for place in places]
        keys = [slice_key(case, place, channels) for place in places]
        yield torch.stack([case.images[slices] for slices in chosen]), keys


def _checked(channels: str) -> str:
    if channels not in CHANNELS:
        raise ValueError(f"channels is {channels!r}; expected one of {CHANNELS}")
    return channels


def _channel_slices(place: int, count: int, channels: str) -> list[int]:
    """Indices of the three slices that make the channels of slice `place` of `count`."""
    if channels == "repeat":
        return [place] * 3
    return [max(place - 1, 0), place, min(place + 1, count - 1)]
