"""A site's scans, read when they are first needed and kept in memory from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.errors import Stopped
from flap_nvflare.training.schedule import never
from flap_nvflare.training.seeds import derive_seed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from flap_nvflare.data.kits import Case, SiteCases
    from flap_nvflare.data.volume import Volume
    from flap_nvflare.data.window import Window

SPLITS = ("train", "validation", "test")
POOL = "+"


class SiteData:
    """The scans of one site, or of several pooled as if they were one.

    Pooling breaks what a federation is for and exists only as its baseline: a site named
    `A+B` has the cases of A and B, each normalised by the window of its own site.

    Args:
        federation: what all sites agree on.
        site: the site's disk; names joined by `+` are pooled.
    """

    def __init__(self, federation: Federation, site: Site) -> None:
        self.federation = federation
        self.site = site
        self.names = tuple(site.name.split(POOL))
        self._volumes: dict[tuple[str, str], tuple[Volume, ...]] = {}
        self._windows: dict[str, Window] = {}

    @cached_property
    def by_site(self) -> dict[str, SiteCases]:
        """The cases of each pooled site; reads names, no scans."""
        from flap_nvflare.data.kits import read_kits

        settings = self.federation
        return {
            name: read_kits(self.site.data_root, name, settings.validation_fraction, settings.seed)
            for name in self.names
        }

    @cached_property
    def cases(self) -> SiteCases:
        """All cases of the site, one tuple a split."""
        from flap_nvflare.data.kits import SiteCases

        return SiteCases(**{split: self._cases(split) for split in SPLITS})

    def _cases(self, split: str) -> tuple[Case, ...]:
        return tuple(case for cases in self.by_site.values() for case in getattr(cases, split))

    def volumes(
        self, split: str, should_stop: Callable[[], bool] = never
    ) -> list[tuple[Volume, Window]]:
        """The volumes of a split, each with the window of its own site.

        Raises:
            ValueError: on an unknown split.
            Stopped: between two scans, if asked to.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; expected one of {SPLITS}")
        return [
            (volume, self._window(name, should_stop))
            for name in self.names
            for volume in self._load(name, split, should_stop)
        ]

    def _window(self, name: str, should_stop: Callable[[], bool]) -> Window:
        """The window of one site, always from its training cases."""
        if name not in self._windows:
            from flap_nvflare.data.window import foreground_window

            self._windows[name] = foreground_window(self._load(name, "train", should_stop))
        return self._windows[name]

    def _load(self, name: str, split: str, should_stop: Callable[[], bool]) -> tuple[Volume, ...]:
        if (name, split) not in self._volumes:
            from flap_nvflare.data.volume import load_volume

            volumes = []
            for case in getattr(self.by_site[name], split):
                if should_stop():
                    raise Stopped(f"site {self.site.name}: stopped as asked before {case.name}")
                volumes.append(load_volume(case, self.federation.classes))
            self._volumes[name, split] = tuple(volumes)
        return self._volumes[name, split]

    def loader(
        self,
        round_index: int,
        should_stop: Callable[[], bool] = never,
        shard: tuple[int, int] = (0, 1),
    ) -> DataLoader:
        """Batches of a round's training slices, the same for the same seed, site and round.

        `shard` (rank, count) takes one process's rows of every batch, see `RankBatches`.
        """
        from torch.utils.data import ConcatDataset, DataLoader

        from flap_nvflare.data.slices import SliceDataset, foreground_sampler
        from flap_nvflare.training.rank_batches import RankBatches

        settings = self.federation
        seed = derive_seed(settings.seed, self.site.name, round_index)
        parts: dict[str, tuple[list[Volume], Window]] = {}
        for name in self.names:
            volumes = list(self._load(name, "train", should_stop))
            parts[name] = volumes, self._window(name, should_stop)
        datasets = [
            SliceDataset(
                volumes,
                window,
                settings.image_size,
                channels=settings.channels,
                augment=settings.augment,
                seed=derive_seed(seed, "augment", name),
            )
            for name, (volumes, window) in parts.items()
        ]
        dataset = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
        sampler = foreground_sampler(
            dataset, settings.foreground_fraction, derive_seed(seed, "sampler")
        )
        generator = torch.Generator().manual_seed(derive_seed(seed, "loader"))
        batches = RankBatches(sampler, settings.batch_size, *shard)
        return DataLoader(dataset, batch_sampler=batches, generator=generator)


class VolumeBatches:
    """Every slice of every volume once, in order, in batches that never cross volumes.

    Args:
        data: the site's scans.
        split: `train`, `validation` or `test`.
        should_stop: asked before every batch.
    """

    def __init__(self, data: SiteData, split: str, should_stop: Callable[[], bool]) -> None:
        self.settings = data.federation
        self.volumes = data.volumes(split, should_stop)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from flap_nvflare.data.slices import volume_batches

        settings = self.settings
        for volume, window in self.volumes:
            for images in volume_batches(
                volume, window, settings.image_size, settings.channels, settings.batch_size
            ):
                yield {"image": images, "volume": volume}
