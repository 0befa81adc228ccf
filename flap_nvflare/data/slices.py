"""Volumes as slices: windowed, resized to the network's input, drawn and augmented.

A volume is windowed and resized once; the result is kept as long as the volume itself, so that
the next round's data set costs nothing. Augmentation belongs to the draw, not to the order of
calls: the same seed, slice and draw give the same bytes whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import ConcatDataset, Dataset, Sampler

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.volume import Volume
from flap_nvflare.data.window import Window

CHANNELS = ("repeat", "neighbours")
_Prepared = dict[tuple[Window, int], tuple[Tensor, Tensor]]
_prepared: WeakKeyDictionary[Volume, _Prepared] = WeakKeyDictionary()


class Draw(int):
    """The index of a slice that also knows how often the sampler has drawn before.

    It stays a draw when a `ConcatDataset` subtracts the offset of the part it belongs to.
    """

    number: int

    def __new__(cls, index: int, number: int) -> Draw:
        draw = super().__new__(cls, index)
        draw.number = number
        return draw

    def __sub__(self, offset: int) -> Draw:
        return Draw(int(self) - offset, self.number)

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int]]:
        return Draw, (int(self), self.number)


class SliceDataset(Dataset[dict[str, Any]]):
    """The slices of some volumes, one after the other.

    An item holds `image` (3, S, S) float32, `label` (1, S, S) uint8, `case` and `slice`.

    Args:
        volumes: volumes of one site.
        window: the site's grey values.
        image_size: S, side of the network's input; H and W are both resized to it.
        channels: `repeat` (the slice three times) or `neighbours` (slice before, slice, slice
            after in the order of the volume, the end slices repeated).
        augment: random changes, see `flap_nvflare.data.augment`.
        seed: of the augmentation.

    Attributes:
        shows_foreground: whether each slice has a label above 0.

    Raises:
        DataError: if there is no volume.
        ValueError: on another `channels`.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        window: Window,
        image_size: int,
        channels: str = "repeat",
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        if not volumes:
            raise DataError("no volume to draw slices from; give the site at least one case")
        self._neighbours = _checked(channels) == "neighbours"
        self._names = [volume.name for volume in volumes]
        self._stacks = [_prepare(volume, window, image_size) for volume in volumes]
        self._places = [
            (number, index)
            for number, (images, _) in enumerate(self._stacks)
            for index in range(len(images))
        ]
        self.shows_foreground = [
            bool(shows)
            for _, labels in self._stacks
            for shows in labels.flatten(start_dim=1).any(dim=1)
        ]
        self._augment = augment
        self._seed = seed

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A slice by its index; a `Draw` also chooses the augmentation."""
        volume, place = self._places[index]
        images, labels = self._stacks[volume]
        image = images[_channel_slices(place, len(images), self._neighbours)]
        label = labels[place][None]
        if self._augment:
            from flap_nvflare.data.augment import augment

            image, label = augment(image, label, self._seed, int(index), _number(index))
        return {"image": image, "label": label, "case": self._names[volume], "slice": place}


class ForegroundSampler(Sampler[int]):
    """Slices in random order, a given share of them with foreground.

    An epoch has (slices with foreground) / `fraction` draws, at most the number of slices. The
    number of foreground draws is `fraction` of that, rounded up or down at random so that its
    expectation is exact. Within an epoch a slice comes again only when all slices of its kind
    have come. Every epoch goes on where the last one left the generator.

    Args:
        shows_foreground: whether each slice shows foreground.
        fraction: expected share of draws with foreground, 0 to 1; 1 if every slice shows it.
        seed: of the generator.

    Raises:
        DataError: if `fraction` is not from 0 to 1, or asks for slices of which there are none.
    """

    def __init__(self, shows_foreground: Sequence[bool], fraction: float, seed: int) -> None:
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
        self._generator = torch.Generator().manual_seed(seed)
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
        for index in drawn[order].tolist():
            yield Draw(index, self._drawn)
            self._drawn += 1

    def _pick(self, indices: Tensor, count: int) -> Tensor:
        """`count` of `indices`, as evenly as possible."""
        picked = [indices[:0]]
        while count > 0:
            order = torch.randperm(len(indices), generator=self._generator)[:count]
            picked.append(indices[order])
            count -= len(order)
        return torch.cat(picked)


def foreground_sampler(
    dataset: Dataset[Any], foreground_fraction: float, seed: int
) -> ForegroundSampler:
    """The sampler of a `SliceDataset` or of a `ConcatDataset` of them."""
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    shows = [shown for part in parts for shown in part.shows_foreground]  # type: ignore[attr-defined]
    return ForegroundSampler(shows, foreground_fraction, seed)


def volume_batches(
    volume: Volume, window: Window, image_size: int, channels: str, batch_size: int
) -> Iterator[Tensor]:
    """Every slice of a volume once, in order, as (n, 3, S, S) float32 with n <= `batch_size`.

    Only a batch and its neighbours are windowed and resized at a time; nothing is kept.

    Raises:
        ValueError: on another `channels` or a batch size below 1.
    """
    neighbours = _checked(channels) == "neighbours"
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    count = len(volume.image)
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        first, last = max(start - 1, 0), min(stop + 1, count)
        images = _resized_image(volume, window, image_size, slice(first, last))
        yield torch.stack(
            [
                images[[index - first for index in _channel_slices(place, count, neighbours)]]
                for place in range(start, stop)
            ]
        )


def _checked(channels: str) -> str:
    if channels not in CHANNELS:
        raise ValueError(f"channels is {channels!r}; expected one of {CHANNELS}")
    return channels


def _channel_slices(place: int, count: int, neighbours: bool) -> list[int]:
    """Indices of the three slices that make the channels of slice `place` of `count`."""
    if not neighbours:
        return [place] * 3
    return [max(place - 1, 0), place, min(place + 1, count - 1)]


def _number(index: int) -> int:
    return index.number if isinstance(index, Draw) else 0


def _prepare(volume: Volume, window: Window, image_size: int) -> tuple[Tensor, Tensor]:
    """Images (S', S, S) float32 and labels (S', S, S) uint8 of a volume, made once."""
    kept = _prepared.setdefault(volume, {})
    key = (window, image_size)
    if key not in kept:
        label = torch.from_numpy(volume.label)[:, None].to(torch.uint8)
        resized = interpolate(label, size=(image_size, image_size), mode="nearest-exact")
        kept[key] = (
            _resized_image(volume, window, image_size, slice(None)),
            resized[:, 0].contiguous(),
        )
    return kept[key]


def _resized_image(volume: Volume, window: Window, image_size: int, part: slice) -> Tensor:
    """Slices (n, S, S) float32 through the window, bilinear, low-pass filtered when shrunk."""
    image = torch.from_numpy(window.apply(volume.image[part]))[:, None]
    resized = interpolate(
        image, size=(image_size, image_size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[:, 0].contiguous()
