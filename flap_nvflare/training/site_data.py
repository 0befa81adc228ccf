"""A site's scans, prepared when they are first needed and kept from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.errors import Stopped
from flap_nvflare.training.schedule import never
from flap_nvflare.training.seeds import derive_seed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from flap_nvflare.data.cases import Case, SiteCases
    from flap_nvflare.data.draws import ForegroundSampler
    from flap_nvflare.data.prepared import Prepared
    from flap_nvflare.data.slices import Views
    from flap_nvflare.data.store import Store
    from flap_nvflare.data.volume import Volume
    from flap_nvflare.data.window import Window

SPLITS = ("train", "validation", "test")
POOL = "+"
CACHE = "cache"
# Volumes kept between the first look at all training cases, for the window, and their
# preparation. What is beyond is read a second time: 12 GB of volumes fit in few machines.
_HELD_BYTES = 2_000_000_000


class SiteData:
    """The scans of one site, or of several pooled as if they were one.

    Pooling breaks what a federation is for and exists only as its baseline: a site named
    `A+B` has the cases of A and B, each normalised by the window of its own site or, with
    `grey_values` `scan`, by its own.

    Prepared cases and windows are kept in `Site.state_dir`/cache, where the site has one, and
    in memory. Reading, checking and resizing are done once for all rounds and processes.

    Args:
        federation: what all sites agree on.
        site: the site's disk; names joined by `+` are pooled.
    """

    def __init__(self, federation: Federation, site: Site) -> None:
        self.federation = federation
        self.site = site
        self.names = tuple(site.name.split(POOL))
        self._prepared: dict[tuple[str, str], tuple[Prepared, ...]] = {}
        self._windows: dict[str, Window] = {}
        self._shard = (0, 1)
        self._loader: tuple[DataLoader, ForegroundSampler] | None = None

    @cached_property
    def by_site(self) -> dict[str, SiteCases]:
        """The cases of each pooled site; reads names, no scans."""
        from flap_nvflare.data.source import read_cases

        settings, site = self.federation, self.site
        share, seed = settings.validation_fraction, settings.seed
        return {
            name: read_cases(site.data_root, name, share, seed, site.data_source)
            for name in self.names
        }

    @cached_property
    def cases(self) -> SiteCases:
        """All cases of the site, one tuple a split."""
        from flap_nvflare.data.cases import SiteCases

        return SiteCases(**{split: self._cases(split) for split in SPLITS})

    def _cases(self, split: str) -> tuple[Case, ...]:
        return tuple(case for cases in self.by_site.values() for case in getattr(cases, split))

    def prepared(self, split: str, should_stop: Callable[[], bool] = never) -> list[Prepared]:
        """The cases of a split as the network sees them.

        Raises:
            ValueError: on an unknown split.
            DataError: if a scan cannot be used.
            Stopped: between two scans, if asked to.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; expected one of {SPLITS}")
        return [case for name in self.names for case in self._load(name, split, should_stop)]

    def window(self, name: str, should_stop: Callable[[], bool] = never) -> Window:
        """The window of one of the pooled sites, always from its training cases.

        With `grey_values` `scan` nobody needs it: see `window_of`.
        """
        if name not in self._windows:
            from flap_nvflare.data.prepared import read_window, window_key, write_window
            from flap_nvflare.data.window import foreground_window

            train = self.by_site[name].train
            key = window_key(train, self.federation.classes)
            held: dict[str, Volume] = {}
            window = read_window(self.store, key)
            if window is None:
                window = foreground_window(self._read(train, held, should_stop))
                write_window(self.store, key, window)
            self._windows[name] = window
            # While the volumes are at hand: otherwise they would be read once more.
            self._prepare(name, "train", held, should_stop)
        return self._windows[name]

    def window_of(self, name: str, volume: Volume) -> Window:
        """What the network sees a volume of one of the pooled sites through."""
        from flap_nvflare.data.window import volume_window

        by_scan = self.federation.grey_values == "scan"
        return volume_window(volume) if by_scan else self.window(name)

    @cached_property
    def store(self) -> Store:
        """Where the site keeps what is made from its scans."""
        from flap_nvflare.data.store import Store

        keeps = self.site.state_dir is not None and self.site.cache_gb > 0
        folder = self.site.state_dir / CACHE if keeps and self.site.state_dir else None
        return Store(folder, int(self.site.cache_gb * 1e9))

    def _read(
        self, cases: Sequence[Case], held: dict[str, Volume], should_stop: Callable[[], bool]
    ) -> Iterator[Volume]:
        """The volumes of `cases` one by one; the first of them stay in `held`."""
        from flap_nvflare.data.volume import load_volume

        room = _HELD_BYTES
        for case in cases:
            self._ask(case, should_stop)
            volume = load_volume(case, self.federation.classes)
            room -= volume.image.nbytes + volume.label.nbytes
            if room >= 0:
                held[case.name] = volume
            yield volume

    def _load(self, name: str, split: str, should_stop: Callable[[], bool]) -> tuple[Prepared, ...]:
        if (name, split) not in self._prepared and self.federation.grey_values == "site":
            self.window(name, should_stop)
        if (name, split) not in self._prepared:
            self._prepare(name, split, {}, should_stop)
        return self._prepared[name, split]

    def _prepare(
        self, name: str, split: str, held: dict[str, Volume], should_stop: Callable[[], bool]
    ) -> None:
        from flap_nvflare.data.prepared import PreparedCases

        settings, cases = self.federation, getattr(self.by_site[name], split)
        window = self._windows[name] if settings.grey_values == "site" else None
        dataset = PreparedCases(
            cases, window, settings.image_size, settings.classes, self.store, held
        )
        prepared = []
        for number, case in enumerate(cases):
            self._ask(case, should_stop)
            prepared.append(dataset[number])
        self._prepared[name, split] = tuple(prepared)

    def _ask(self, case: Case, should_stop: Callable[[], bool]) -> None:
        if should_stop():
            raise Stopped(f"site {self.site.name}: stopped as asked before {case.name}")

    def loader(
        self,
        round_index: int,
        should_stop: Callable[[], bool] = never,
        shard: tuple[int, int] = (0, 1),
    ) -> DataLoader:
        """Batches of a round's training slices, the same for the same seed, site and round.

        There is one loader for all rounds, so its workers live on; a round has its own draws.

        Args:
            round_index: the round, from 0.
            should_stop: asked between two scans.
            shard: rank and count of the processes that share every batch, see `RankBatches`.
        """
        seed = derive_seed(self.federation.seed, self.site.name, round_index)
        if self._loader is None or self._shard != shard:
            self._loader, self._shard = self._make_loader(should_stop, shard), shard
        loader, sampler = self._loader
        sampler.begin(
            derive_seed(seed, "sampler"),
            [derive_seed(seed, "augment", name) for name in self.names],
        )
        loader.generator.manual_seed(derive_seed(seed, "loader"))
        return loader

    def _make_loader(
        self, should_stop: Callable[[], bool], shard: tuple[int, int]
    ) -> tuple[DataLoader, ForegroundSampler]:
        from torch.utils.data import ConcatDataset, DataLoader

        from flap_nvflare.data.draws import foreground_sampler
        from flap_nvflare.data.slices import SliceDataset
        from flap_nvflare.training.rank_batches import RankBatches

        settings = self.federation
        datasets = [
            SliceDataset(
                self._load(name, "train", should_stop), settings.channels, self._views(name)
            )
            for name in self.names
        ]
        dataset = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
        sampler = foreground_sampler(
            dataset,
            settings.foreground_fraction,
            seed=0,
            weighted=settings.loss_weighting == "importance",
        )
        loader = DataLoader(
            dataset,
            batch_sampler=RankBatches(sampler, settings.batch_size, *shard),
            generator=torch.Generator(),
            num_workers=self.site.workers,
            persistent_workers=self.site.workers > 0,
            # Not forked: FLARE's process has threads, whose locks a fork would copy.
            multiprocessing_context="forkserver" if self.site.workers else None,
        )
        return loader, sampler

    def _views(self, name: str) -> Views | None:
        from flap_nvflare.data.slices import Views

        settings = self.federation
        if not settings.augment:
            return None
        return Views(settings.augment_views, derive_seed(settings.seed, name, "views"))


class VolumeBatches:
    """Every slice of every case once, in order, in batches that never cross cases.

    A batch holds `image` (n, 3, S', S') float32, `volume`, the prepared case that they are of,
    and `key`, the keys of the n slices as in `SliceDataset`.

    Args:
        data: the site's scans.
        split: `train`, `validation` or `test`.
        should_stop: asked before every batch.
    """

    def __init__(self, data: SiteData, split: str, should_stop: Callable[[], bool]) -> None:
        self.settings = data.federation
        self.volumes = data.prepared(split, should_stop)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from flap_nvflare.data.slices import volume_batches

        for case in self.volumes:
            for images, keys in volume_batches(
                case, self.settings.channels, self.settings.batch_size
            ):
                yield {"image": images, "volume": case, "key": keys}
