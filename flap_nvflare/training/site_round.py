"""A site's side of one round: from what the server sends to what the site sends back.

What a rule of aggregation or an optimiser asks of a site beyond plain training is here: tensors
that stay, ranks of its own, a changed base, controls, a second adapter. So is the memory of it, on
the site's disk, from which a killed run goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import without_factors
from flap_nvflare.adapter.update import UpdateSpec, content_sha256, load_update, save_update
from flap_nvflare.training import received, site_memory
from flap_nvflare.training.local_terms import NO_TERMS, Pull, Terms
from flap_nvflare.training.schedule import never
from flap_nvflare.training.scores import SiteScore
from flap_nvflare.training.site_memory import SiteMemory
from flap_nvflare.training.work import Moments, SiteWork, TrainReport

Tensors = Mapping[str, Tensor]
Progress = Callable[[dict[str, Any]], None]
Run = Callable[[SiteWork, int, Callable[[], bool], Progress], TrainReport]

ADAPTER = "adapter.safetensors"
_NOTHING: Tensors = MappingProxyType({})


def in_this_process(
    work: SiteWork, round_index: int, should_stop: Callable[[], bool], progress: Progress
) -> TrainReport:
    """Trains as `SiteWork.train` does; the default of what `SiteRound.train` runs."""
    return work.train(round_index, should_stop, progress)


class SiteRound:
    """Receives, scores, trains, sends and remembers, in this order, round by round.

    With `personal: ditto` (arXiv 2012.04221) a second, personal adapter of all that trains takes
    the same steps on the same slices with moments of its own, pulled towards the adapter that the
    round started from; scores are then the personal one's. The shared one is trained as without.

    Args:
        work: the site's parts.
        folder: the site's own folder for this run, where its memory lies.
    """

    def __init__(self, work: SiteWork, folder: Path) -> None:
        self.work = work
        self.memory = SiteMemory(folder)
        self._received: int | None = None
        self._trained: int | None = None
        self._start: dict[str, Tensor] = {}
        self._personal: dict[str, Tensor] = {}
        self._personal_moments: Moments | None = None
        self._control: dict[str, Tensor] = {}
        self._own_control: dict[str, Tensor] = {}
        self._control_change: dict[str, Tensor] = {}

    # ---- the way down --------------------------------------------------------------------
    def receive(
        self,
        tensors: Tensors,
        *,
        round_index: int,
        turned: bool,
        offset: Tensors = _NOTHING,
        control: Tensors = _NOTHING,
    ) -> None:
        """Takes the server's adapter as the start of a round, or to score it.

        Args:
            tensors: exactly what `SiteWork.spec_down` says; factors of a larger rank than the
                site's are cut to their first rows and columns.
            round_index: the round, from 0; the number of rounds after the last.
            turned: whether the factors are in another basis than after the last round: their
                moments (but with `moments: keep`) and controls then count for nothing.
            offset: the change of the frozen base that holds from now on.
            control: SCAFFOLD's control of the server; what is not named is zero.

        Raises:
            UpdateError: if names or shapes are not as expected.
            ValueError: if the offset does not fit.
            StateError: if a file of this site's memory does not. The network is as before in all
                these cases.
        """
        self._received = self._trained = None
        own = received.own_share(self.work, tensors)
        received.check_offset(self.work, offset)
        server_control = received.server_control(self.work, control)
        last = self.memory.last(round_index)
        private = self._private(last)
        personal = self._read_personal(last)
        own_control = self._read_control(last)
        self._load_moments(last, round_index, turned)
        if self._ditto:
            self._load_personal_moments(last)
        self.work.network.set_offset(offset)
        self.work.load_adapter({**own, **private})
        self._start = own
        self._personal = (personal or self.work.adapter()) if self._ditto else {}
        still = without_factors if turned else dict
        self._control, self._own_control = still(server_control), still(own_control)
        self._received = round_index

    def fixed_sha256(self) -> str:
        """SHA-256 of the factors that this site drew by itself, to compare with the server's."""
        return content_sha256(self.work.fixed())

    # ---- at the site ---------------------------------------------------------------------
    def evaluate(
        self,
        split: str,
        should_stop: Callable[[], bool] = never,
        surface_tolerance: float | None = None,
        personal: bool = True,
    ) -> SiteScore:
        """Scores what this site would use, Ditto's own adapter if it has one; see `SiteWork`.

        Args:
            split: `validation` or `test`.
            should_stop: asked before every batch and every scan read.
            surface_tolerance: see `SiteWork.evaluate`.
            personal: False scores the adapter that was received all the same.
        """
        if not (personal and self._ditto and self._personal):
            return self.work.evaluate(split, should_stop, surface_tolerance)
        shared = self.work.adapter()
        self.work.load_adapter(self._personal)
        try:
            return self.work.evaluate(split, should_stop, surface_tolerance)
        finally:
            self.work.load_adapter(shared)

    def train(
        self,
        round_index: int,
        should_stop: Callable[[], bool] = never,
        progress: Progress | None = None,
        run: Run | None = None,
    ) -> TrainReport:
        """Trains the round that was received, and the personal adapter after it.

        Args:
            round_index: the round, from 0.
            should_stop: asked before every step and every scan read.
            progress: told of every step of the shared adapter.
            run: does the training, for instance in several processes; None for this one.

        Returns:
            The report of the shared adapter; the seconds are those of both.

        Raises:
            ValueError: if the round was not received.
            Stopped, TrainingError and others: as `SiteWork.train`; `receive` before going on.
        """
        if self._received != round_index:
            raise ValueError(f"round {round_index} was not received; call receive first")
        self._received, federation, run = None, self.work.federation, run or in_this_process
        names = [name for name in self._start if self.work.parts.up(name, round_index)]
        terms = NO_TERMS
        if federation.optimizer == "fedprox":
            terms = Terms(self._pull(federation.proximal_weight))
        if self._scaffold:
            shift = {name: self._control[name] - self._own_control[name] for name in names}
            terms = Terms(shift=shift, collect=names)
        report, mean = self._pass(terms, round_index, should_stop, progress or _silent, run)
        if self._scaffold:
            self._control_change = {name: mean[name] - self._own_control[name] for name in names}
            self._own_control = {**self._own_control, **mean}
        if self._ditto:
            seconds = self._train_personal(round_index, should_stop, run)
            report = dataclasses.replace(report, seconds=report.seconds + seconds)
        self._trained = round_index
        return report

    # ---- the way up ----------------------------------------------------------------------
    def update(self) -> dict[str, Tensor]:
        """What leaves the site after the round, as `SiteWork.spec` of the round says."""
        round_index = self._require_trained()
        up = self.work.parts.up
        return {n: t for n, t in self.work.adapter().items() if up(n, round_index)}

    def control_change(self) -> dict[str, Tensor]:
        """SCAFFOLD's c_k' - c_k, by the names of `update`; empty with another optimiser."""
        self._require_trained()
        return dict(self._control_change)

    # ---- memory --------------------------------------------------------------------------
    def save(self, round_index: int) -> None:
        """Writes what the next round needs; from then on the round counts as done.

        Raises:
            ValueError: if the round was not trained.
            OSError: if a file can't be written.
        """
        if self._require_trained() != round_index:
            raise ValueError(f"round {round_index} was not trained, but round {self._trained}")
        memory, adapter = self.memory, self.work.adapter()
        memory.begin(round_index)
        private = {n: t for n, t in adapter.items() if self.work.parts.private(n)}
        if private:
            memory.write(site_memory.PRIVATE, round_index, private)
        if self._scaffold:
            memory.write(site_memory.CONTROL, round_index, self._own_control)
        if self._ditto:
            memory.write(site_memory.PERSONAL, round_index, self._personal)
            shared = self.work.swap_state(self._personal_moments)
            self.work.save_state(memory.path(site_memory.PERSONAL_MOMENTS, round_index))
            self._personal_moments = self.work.swap_state(shared)
        memory.folder.mkdir(parents=True, exist_ok=True)
        spec = self.work.spec()
        save_update(memory.folder / ADAPTER, {n: adapter[n] for n in spec.shapes}, spec)
        self.work.save_state(memory.path(site_memory.MOMENTS, round_index))
        memory.finish(round_index)

    def last_adapter(self) -> tuple[dict[str, Tensor], UpdateSpec]:
        """All that may leave the site of its last own adapter, whatever the round sent of it.

        Raises:
            UpdateError: if no round was saved.
        """
        tensors, spec, _ = load_update(self.memory.folder / ADAPTER)
        return tensors, spec

    def state_files(self) -> list[Path]:
        """The files of this site's memory, sorted."""
        return self.memory.files()

    # ---- steps of the above --------------------------------------------------------------
    @property
    def _ditto(self) -> bool:
        return self.work.federation.personal == "ditto"

    @property
    def _scaffold(self) -> bool:
        return self.work.federation.optimizer == "scaffold"

    def _require_trained(self) -> int:
        if self._trained is None:
            raise ValueError("no round was trained since the last was received; call train first")
        return self._trained

    def _private(self, last: int | None) -> dict[str, Tensor]:
        fresh = self.work.fresh_private()
        found = self._read(site_memory.PRIVATE, last, fresh) if fresh else None
        return fresh if found is None else found

    def _read_personal(self, last: int | None) -> dict[str, Tensor] | None:
        like: Tensors = self.work.parameters
        return self._read(site_memory.PERSONAL, last, like) if self._ditto else None

    def _read_control(self, last: int | None) -> dict[str, Tensor]:
        if not self._scaffold:
            return {}
        zeros = {name: torch.zeros(shape) for name, shape in self.work.spec().shapes.items()}
        found = self._read(site_memory.CONTROL, last, zeros)
        return zeros if found is None else found

    def _read(self, kind: str, last: int | None, like: Tensors) -> dict[str, Tensor] | None:
        shapes = {name: tuple(tensor.shape) for name, tensor in like.items()}
        return None if last is None else self.memory.read(kind, last, shapes)

    def _load_moments(self, last: int | None, round_index: int, turned: bool) -> None:
        if last is None or last != round_index - 1:  # what they point to has moved on without
            self.work.reset_state()
            return
        reset = turned and self.work.federation.moments != "keep"
        self.work.load_state(self.memory.path(site_memory.MOMENTS, last), reset_factors=reset)

    def _load_personal_moments(self, last: int | None) -> None:
        """The personal adapter is no other's: no rule turns it, no missed round makes it old."""
        shared = self.work.swap_state()
        if last is not None:
            path = self.memory.path(site_memory.PERSONAL_MOMENTS, last)
            self.work.load_state(path, reset_factors=False)
        self._personal_moments = self.work.swap_state(shared)

    def _pull(self, weight: float) -> Pull:
        return Pull(weight, self.work.federation.proximal_on, self._start)

    def _pass(
        self,
        terms: Terms,
        round_index: int,
        should_stop: Callable[[], bool],
        progress: Progress,
        run: Run,
    ) -> tuple[TrainReport, dict[str, Tensor]]:
        """Trains what `work` holds under the terms; returns the mean gradients they collect."""
        self.work.terms.set(terms)
        try:
            report = run(self.work, round_index, should_stop, progress)
            return report, self.work.terms.mean()
        finally:
            self.work.terms.set(NO_TERMS)

    def _train_personal(self, round_index: int, should_stop: Callable[[], bool], run: Run) -> float:
        shared, moments = self.work.adapter(), self.work.swap_state(self._personal_moments)
        self.work.load_adapter(self._personal)
        terms = Terms(self._pull(self.work.federation.ditto_weight))
        report, _ = self._pass(terms, round_index, should_stop, _silent, run)
        self._personal = self.work.adapter()
        self._personal_moments = self.work.swap_state(moments)
        self.work.load_adapter(shared)
        return report.seconds


def _silent(figures: dict[str, Any]) -> None:
    """Told of a step: nobody listens."""
