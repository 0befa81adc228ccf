"""Prepared cases as slices: as they are or changed at random, one by one or in order.

Augmentation belongs to the draw, not to the order of calls: the same seed, slice and draw give the
same bytes whatever the number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flap_nvflare.data.draws import Draw
from flap_nvflare.data.errors import DataError

if TYPE_CHECKING:
    from flap_nvflare.data.prepared import Prepared

CHANNELS = ("repeat", "neighbours")


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
        draw = index if isinstance(index, Draw) else Draw(index, 0)
        number, place = self._places[draw]
        case = self._cases[number]
        image = case.images[_channel_slices(place, len(case.images), self._channels)]
        label = case.labels[place][None]
        key = slice_key(case, place, self._channels)
        if self._views is not None:
            from flap_nvflare.data.augment import VERSION, augment

            entropy = _entropy(self._views, case, place, draw)
            image, label = augment(image, label, entropy)
            fixed = self._views.count > 0
            key = slice_key(case, place, self._channels, (VERSION, *entropy)) if fixed else ""
        item = {"image": image, "label": label, "case": case.name, "slice": place, "key": key}
        return item if draw.weight is None else {**item, "weight": torch.tensor(draw.weight)}


def slice_key(case: Prepared, place: int, channels: str, view: Sequence[int] = ()) -> str:
    """Hash of all that decides the image of slice `place`; no `view` is the slice as it is."""
    text = f"{case.key}/{place}/{channels}/{tuple(view) or 'plain'}"
    return hashlib.sha256(text.encode()).hexdigest()


def _entropy(views: Views, case: Prepared, place: int, draw: Draw) -> tuple[int, ...]:
    """What decides the change of this draw."""
    fresh = (draw.seed, int(draw), draw.number)
    if views.count == 0:
        return fresh
    view = int(np.random.SeedSequence(fresh).generate_state(1)[0]) % views.count
    name = int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:8], "big")
    return (views.seed, name, place, view)


def volume_batches(
    case: Prepared, channels: str, batch_size: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Every slice of a case once, in order, as (n, 3, S', S') float32 with n <= `batch_size`.

    Beside the images come the keys of their slices, those of `SliceDataset` without changes.

    Raises:
        ValueError: on another `channels` or a batch size below 1.
    """
    count = len(case.images)
    for images, places in image_batches(
        lambda first, last: case.images[first:last], count, channels, batch_size
    ):
        yield images, [slice_key(case, place, channels) for place in places]


def image_batches(
    images: Callable[[int, int], Tensor], count: int, channels: str, batch_size: int
) -> Iterator[tuple[Tensor, range]]:
    """Every slice of a volume once, in order, as `volume_batches`, with only a slab in memory.

    Args:
        images: gives slices `first` to before `last` as (n, S', S') float32.
        count: slices of the volume.
        channels: as of `SliceDataset`.
        batch_size: slices in a batch at most.

    Returns:
        Batches (n, 3, S', S') with the places of their slices.

    Raises:
        ValueError: on another `channels` or a batch size below 1.
    """
    _checked(channels)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    for start in range(0, count, batch_size):
        places = range(start, min(start + batch_size, count))
        chosen = [_channel_slices(place, count, channels) for place in places]
        first = min(map(min, chosen))
        slab = images(first, max(map(max, chosen)) + 1)
        yield torch.stack([slab[[place - first for place in three]] for three in chosen]), places


def _checked(channels: str) -> str:
    if channels not in CHANNELS:
        raise ValueError(f"channels is {channels!r}; expected one of {CHANNELS}")
    return channels


def _channel_slices(place: int, count: int, channels: str) -> list[int]:
    """Indices of the three slices that make the channels of slice `place` of `count`."""
    if channels == "repeat":
        return [place] * 3
    return [max(place - 1, 0), place, min(place + 1, count - 1)]
