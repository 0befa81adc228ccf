"""One site's work: train a round, score a split, remember both.

The parts come from the bundle's config; whoever wants a site trained, MONAI's command or a
federation's executor, ends up here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flap_nvflare.adapter.factors import shape_of_rank
from flap_nvflare.sam import tuning
from flap_nvflare.sam.tuning import Parts
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.handlers import RoundWatch
from flap_nvflare.training.local_terms import LocalTerms
from flap_nvflare.training.moments import load_moments, save_moments
from flap_nvflare.training.ranks import ONE_PROCESS, Ranks
from flap_nvflare.training.schedule import RoundClock, never
from flap_nvflare.training.scores import SiteScore
from flap_nvflare.training.seeds import derive_seed
from flap_nvflare.training.site_data import SiteData, VolumeBatches
from flap_nvflare.training.volume_scorer import OnCase, VolumeScorer

if TYPE_CHECKING:
    from flap_nvflare.adapter.update import UpdateSpec
    from flap_nvflare.data.cases import SiteCases
    from flap_nvflare.sam.network import Network
    from flap_nvflare.training.prefix_cache import PrefixCache

Progress = Callable[[dict[str, Any]], None]
Moments = defaultdict[Any, Any]


@dataclass(frozen=True)
class TrainReport:
    """What a round of training was.

    Attributes:
        loss: mean loss over the round's steps.
        steps: optimiser steps.
        slices: slices of the site's training cases, the site's size for `weight_by: slices`.
        cases: the site's training cases.
        seconds: wall-clock of the steps, without reading the scans.
    """

    loss: float
    steps: int
    slices: int
    cases: int
    seconds: float

    def to_dict(self) -> dict[str, float | int]:
        """Values that JSON holds."""
        return asdict(self)


class SiteWork:
    """A site's network with all that trains and scores it.

    Args:
        federation: what all sites agree on.
        site: the site's disk.
        device: where `network` lives.
        network: the network.
        parameters: what trains (in any round), by name.
        optimizer: an AdamW over `parameters`.
        clock: read by the schedule and the handlers, set here.
        watch: the trainer's handler that collects losses.
        trainer: makes a MONAI trainer of `train_data_loader` and `epoch_length`. Each round
            has its own, since an engine that an exception has ended cannot run again.
        evaluator: makes a MONAI evaluator of `val_data_loader` and `val_handlers`.
        data: the site's scans, not read yet.
        ranks: the processes that train this site together, each with a `SiteWork` of its own.
        prefix: what the frozen blocks made of the slices; None computes them at every step.
        parts: what of `parameters` trains when, and travels; None for all of it, always.
        terms: the trainer's handler that adds to gradients; None if it has none.
    """

    def __init__(
        self,
        federation: Federation,
        site: Site,
        device: torch.device,
        network: Network,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clock: RoundClock,
        watch: RoundWatch,
        trainer: Callable[..., Any],
        evaluator: Callable[..., Any],
        data: SiteData,
        ranks: Ranks = ONE_PROCESS,
        prefix: PrefixCache | None = None,
        parts: Parts | None = None,
        terms: LocalTerms | None = None,
    ) -> None:
        self.federation = federation
        self.site = site
        self.device = device
        self.network = network
        self.parameters = dict(sorted(parameters.items()))
        self.optimizer = optimizer
        self.clock = clock
        self.watch = watch
        self.data = data
        self.ranks = ranks
        self.prefix = prefix
        self.parts = parts or Parts(federation.method, parameters=federation.parameters)
        self.terms = terms or LocalTerms(self.parameters)
        # What a site that keeps tensors to itself starts from: no round gives it anything.
        self._drawn = {n: t for n, t in self.adapter().items() if self.parts.private(n)}
        self._new_trainer = trainer
        self._new_evaluator = evaluator
        self._set_threads()

    @property
    def cases(self) -> SiteCases:
        """The site's cases by split; reads no scan."""
        return self.data.cases

    def adapter(self) -> dict[str, torch.Tensor]:
        """Copies of all that trains on the CPU in float32, sorted by name."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, parameter in self.parameters.items()
        }

    def load_adapter(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts `tensors` in place of all that trains.

        Raises:
            ValueError: if names or shapes are not exactly those of `adapter`; nothing is
                changed then.
        """
        if missing := sorted(self.parameters.keys() - tensors.keys()):
            raise ValueError(f"the adapter lacks {missing[0]} ({len(missing)} missing)")
        if extra := sorted(tensors.keys() - self.parameters.keys()):
            raise ValueError(f"the adapter has {extra[0]}, which does not travel ({len(extra)})")
        for name, parameter in self.parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensors[name].shape)}, expected "
                    f"{tuple(parameter.shape)}"
                )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def fresh_private(self) -> dict[str, torch.Tensor]:
        """What trains but never leaves the site, as the federation's seed drew it."""
        return {name: tensor.clone() for name, tensor in self._drawn.items()}

    def fixed(self) -> dict[str, torch.Tensor]:
        """Copies of the factors that stay as the federation's seed drew them."""
        return tuning.fixed(self.network, self.parts)

    @property
    def rank(self) -> int:
        """Rank of the adapters at this site."""
        return self.federation.rank_of(self.site.name)

    def spec(self, round_index: int | None = None) -> UpdateSpec:
        """What an update of this site looks like.

        Args:
            round_index: the round after which it leaves the site; None for all that leaves it
                in any round.
        """
        return self._spec(lambda name: self.parts.up(name, round_index), self.rank)

    def spec_down(self) -> UpdateSpec:
        """What comes from the server: all that is shared, at the federation's rank.

        The change of the frozen base, which some rules send besides, is not in it.
        """
        return self._spec(self.parts.up, self.federation.rank)

    def spec_whole(self) -> UpdateSpec:
        """What `adapter` gives, for the site's own files."""
        return self._spec(self.parts.trained, self.rank)

    def _spec(self, holds: Callable[[str], bool], rank: int) -> UpdateSpec:
        from flap_nvflare.adapter.update import UpdateSpec

        shapes = {
            name: shape_of_rank(name, tuple(parameter.shape), rank)
            for name, parameter in self.parameters.items()
            if holds(name)
        }
        return UpdateSpec(self.federation.method, rank, self.network.base_sha256, shapes)

    def train(
        self,
        round_index: int,
        should_stop: Callable[[], bool] = never,
        progress: Progress | None = None,
    ) -> TrainReport:
        """Trains the round; weights and moments go on from where they are.

        Of several processes each calls this with the same weights and moments, ends with the
        same, and returns the same figures, those of the whole batches.

        Args:
            round_index: the round, from 0; sets the rate and all that is random.
            should_stop: asked before every step and every scan read.
            progress: told {round, step, steps, loss, rate} after every step.

        Raises:
            Stopped: if asked to. Weights and moments are then somewhere within the round:
                load both before going on.
            TrainingError: if the loss is not finite; the same holds.
            SettingsError or DataError: as raised by the data.
        """
        if not 0 <= round_index < self.federation.rounds:
            raise ValueError(
                f"round {round_index} is none of the federation's {self.federation.rounds}"
            )
        self._set_threads()
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self.parts.trained(name, round_index))
        loader = self.data.loader(round_index, should_stop, (self.ranks.rank, self.ranks.count))
        torch.manual_seed(derive_seed(self.federation.seed, self.site.name, round_index, "step"))
        self.clock.index = round_index
        self.clock.steps = len(loader) * self.federation.local_epochs
        self.clock.shares = loader.batch_sampler.shares  # type: ignore[union-attr]
        self.clock.should_stop, self.clock.progress = should_stop, progress
        started = time.perf_counter()
        batches = self.prefix.batches(loader) if self.prefix else loader
        self._new_trainer(train_data_loader=batches, epoch_length=len(loader)).run()
        self.watch.require_whole()
        losses = self.watch.losses
        return TrainReport(
            loss=sum(losses) / len(losses),
            steps=len(losses),
            slices=len(loader.dataset),  # type: ignore[arg-type]
            cases=len(self.cases.train),
            seconds=time.perf_counter() - started,
        )

    def evaluate(
        self,
        split: str,
        should_stop: Callable[[], bool] = never,
        surface_tolerance: float | None = None,
        on_case: OnCase | None = None,
    ) -> SiteScore:
        """Scores every case of `split` in one pass over its slices.

        Args:
            split: `validation` or `test`.
            should_stop: asked before every batch and every scan read.
            surface_tolerance: mm of the normalised surface Dice; None leaves NSD, HD95 and
                FLamby's Dice out, of which the first two take far longer than Dice.
            on_case: told of every case as soon as it is scored, with its mask.

        Raises:
            Stopped: if asked to.
        """
        self._set_threads()
        volumes = VolumeBatches(self.data, split, should_stop)
        batches = self.prefix.batches(volumes) if self.prefix else volumes
        scorer = VolumeScorer(self.federation.classes, should_stop, surface_tolerance, on_case)
        started = time.perf_counter()
        if volumes.volumes:
            with torch.inference_mode():
                self._new_evaluator(val_data_loader=batches, val_handlers=[scorer]).run()
        scorer.require_whole()
        return SiteScore(
            site=self.site.name,
            split=split,
            class_names=tuple(self.federation.class_names),
            cases=tuple(scorer.scores),
            seconds=time.perf_counter() - started,
        )

    def save_state(self, path: Path | str) -> None:
        """Writes the optimiser's moments; see `moments.save_moments`."""
        save_moments(path, self.optimizer, self.parameters)

    def load_state(self, path: Path | str, reset_factors: bool) -> None:
        """Reads the optimiser's moments; see `moments.load_moments`."""
        load_moments(path, self.optimizer, self.parameters, reset_factors)

    def reset_state(self) -> None:
        """Forgets all moments, as in a site that has never trained."""
        self.optimizer.state.clear()

    def swap_state(self, moments: Moments | None = None) -> Moments:
        """Puts other moments (none: fresh ones) in place of the optimiser's; returns those."""
        before: Moments = self.optimizer.state
        self.optimizer.state = defaultdict(dict) if moments is None else moments
        return before

    def _set_threads(self) -> None:
        # The number of threads decides the order of sums, hence the bytes.
        if self.device.type == "cpu" and torch.get_num_threads() != self.federation.threads:
            torch.set_num_threads(self.federation.threads)
