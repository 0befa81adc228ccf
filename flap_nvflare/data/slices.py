"""Axial slices for training and evaluation: windowed, resized once a volume, kept in memory."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import ConcatDataset, Dataset

from flap_nvflare.data.augment import augment as augmented
from flap_nvflare.data.kits import DataError
from flap_nvflare.data.sampler import Draw, ForegroundSampler
from flap_nvflare.data.volume import Volume
from flap_nvflare.data.window import Window

CHANNELS = ("repeat", "neighbours")
# Slices resized at a time: bounds the memory beside the result.
CHUNK = 32

_images: WeakKeyDictionary[Volume, dict[tuple[Window, int], Tensor]] = WeakKeyDictionary()
_labels: WeakKeyDictionary[Volume, dict[int, Tensor]] = WeakKeyDictionary()


class SliceDataset(Dataset[dict[str, Any]]):
    """All slices of some volumes, in order.

    Items are `{"image": (3, S, S) float32, "label": (1, S, S) uint8, "case": str, "slice": int}`
    with `slice` counted within its volume. Resized volumes stay in memory as long as their
    `Volume` does, so a second dataset on the same volumes costs nothing.

    Args:
        volumes: what to cut.
        window: the site's intensity window.
        image_size: side S in pixels; images bilinear with anti-aliasing, labels nearest.
        channels: `repeat` (the slice three times) or `neighbours` (slice below, slice, slice
            above, clamped at the ends).
        augment: random views; the same seed, slice and draw give the same bytes.
        seed: seed of the random views.

    Raises:
        DataError: if there is no volume or `channels` is unknown.
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
            raise DataError("no volume to cut into slices; give at least one case")
        _require_channels(channels)
        self.volumes = tuple(volumes)
        self.channels = channels
        self.augment = augment
        self.seed = seed
        self._images = [network_image(volume, window, image_size) for volume in self.volumes]
        self._labels = [network_label(volume, image_size) for volume in self.volumes]
        self._ends = list(itertools.accumulate(len(labels) for labels in self._labels))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def foreground(self) -> Tensor:
        """(len,) bool: whether the resized slice shows any class above 0."""
        return torch.cat([labels.flatten(1).any(1) for labels in self._labels])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"slice {int(index)} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        position = int(index) - start
        image = _stack(self._images[number], position, position + 1, self.channels)[0]
        label = self._labels[number][position][None]
        if self.augment:
            generator = torch.Generator().manual_seed(self._draw_seed(index))
            image, label = augmented(image, label, generator)
        return {
            "image": image.contiguous(),
            "label": label,
            "case": self.volumes[number].name,
            "slice": position,
        }

    def _draw_seed(self, index: int) -> int:
        """The same in every worker: from dataset seed, slice and draw alone."""
        words = np.random.SeedSequence([self.seed, int(index), getattr(index, "draw", 0)])
        return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))


def foreground_sampler(
    dataset: Dataset[Any], foreground_fraction: float, seed: int = 0
) -> ForegroundSampler:
    """A sampler of training slices of which an expected `foreground_fraction` show a class.

    Args:
        dataset: a `SliceDataset`, or a `ConcatDataset` of them.
        foreground_fraction: from 0 to 1.
        seed: seed of the drawing.

    Raises:
        DataError: if the data have no slice of a kind that the fraction asks for.
    """
    return ForegroundSampler(_foreground(dataset), foreground_fraction, seed)


def volume_batches(
    volume: Volume, window: Window, image_size: int, channels: str = "repeat", batch_size: int = 8
) -> Iterator[Tensor]:
    """Every slice of a volume once, in order, as float32 batches (n, 3, S, S), n <= batch_size."""
    _require_channels(channels)
    if batch_size < 1:
        raise DataError(f"batch_size {batch_size!r} is not positive")
    images = network_image(volume, window, image_size)
    for start in range(0, len(images), batch_size):
        yield _stack(images, start, min(start + batch_size, len(images)), channels).contiguous()


def network_image(volume: Volume, window: Window, image_size: int) -> Tensor:
    """(S, image_size, image_size) float32, windowed and resized; kept with the volume."""
    kept = _images.setdefault(volume, {})
    key = (window, image_size)
    if key not in kept:
        kept[key] = torch.cat(
            [
                interpolate(
                    torch.from_numpy(window.apply(part))[:, None],
                    size=(image_size, image_size),
                    mode="bilinear",
                    align_corners=False,
                    antialias=True,
                )[:, 0]
                for part in _chunks(volume.image)
            ]
        )
    return kept[key]


def network_label(volume: Volume, image_size: int) -> Tensor:
    """(S, image_size, image_size) uint8, nearest voxel; kept with the volume."""
    kept = _labels.setdefault(volume, {})
    if image_size not in kept:
        kept[image_size] = torch.cat(
            [
                interpolate(
                    torch.from_numpy(part)[:, None],
                    size=(image_size, image_size),
                    mode="nearest-exact",
                )[:, 0]
                for part in _chunks(volume.label)
            ]
        )
    return kept[image_size]


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), CHUNK):
        yield array[start : start + CHUNK]


def _stack(images: Tensor, start: int, stop: int, channels: str) -> Tensor:
    """(stop - start, 3, S, S) of the slices start to stop."""
    here = torch.arange(start, stop)
    if channels == "repeat":
        return images[here][:, None].expand(-1, 3, -1, -1)
    near = torch.stack([here - 1, here, here + 1], dim=1).clamp(0, len(images) - 1)
    return images[near]


def _foreground(dataset: Dataset[Any]) -> Tensor:
    if isinstance(dataset, ConcatDataset):
        return torch.cat([_foreground(part) for part in dataset.datasets])
    if isinstance(dataset, SliceDataset):
        return dataset.foreground
    raise DataError(f"{type(dataset).__name__} has no slices; expected a SliceDataset")


def _require_channels(channels: str) -> None:
    if channels not in CHANNELS:
        raise DataError(f"channels {channels!r} is unknown; expected one of {CHANNELS}")


__all__ = [
    "CHANNELS",
    "Draw",
    "SliceDataset",
    "foreground_sampler",
    "network_image",
    "network_label",
    "volume_batches",
]
