"""The federation and its baselines in one process, for tables.

The same workflow at each site and the same rule at the server as under FLARE, called in turn
without processes or messages; a test holds the adapter to FLARE's, bit for bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flap_nvflare.settings import Federation, Site

MODES = ("federated", "alone", "pooled")
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run gave.

    Attributes:
        mode: one of `MODES`.
        federation: the run's settings.
        tensors: the last adapter by model: `federation`, `pooled`, or a site's name.
        scores: by site: the scores on its test cases of the adapter that is meant for it.
        seconds: wall-clock of the whole run.
        history: with `curve`, for each round {round, seconds, dice}: wall-clock of training and
            aggregation so far, all sites in turn, the first round's reading of the scans with
            it, and the validation Dice by class and `mean`, mean over sites. Empty without.
    """

    mode: str
    federation: Federation
    tensors: Mapping[str, Tensors]
    scores: Mapping[str, dict[str, Any]]
    seconds: float
    history: Sequence[dict[str, Any]] = ()

    def mean_dice(self, name: str = "mean") -> float | None:
        """Mean over sites of class `name` or of the classes' mean; sites without are left out.

        None if no site has one.
        """
        return _site_mean(self.scores.values(), name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values without tensors."""
        values: dict[str, Any] = {
            "mode": self.mode,
            "method": self.federation.method,
            "seed": self.federation.seed,
            "parameters": sum(t.numel() for t in next(iter(self.tensors.values())).values()),
            "seconds": round(self.seconds, 1),
            "mean": _site_means(self.scores.values(), self.federation),
            "sites": {site: score["dice"] for site, score in self.scores.items()},
            "federation": self.federation.to_dict(),
        }
        return {**values, "history": list(self.history)} if self.history else values


class Curve:
    """Validation Dice against seconds of training, round by round.

    Args:
        flows: the sites' workflows by name, on whose validation cases the adapters are scored.
    """

    def __init__(self, flows: Mapping[str, Any]) -> None:
        self._flows = flows
        self._spent: dict[int, float] = {}
        self._scores: dict[int, dict[str, dict[str, Any]]] = {}
        self._since = time.perf_counter()

    def start(self) -> None:
        """Training begins or goes on: what was done since the last `mark` does not count."""
        self._since = time.perf_counter()

    def mark(self, round_index: int, tensors: Tensors, sites: Sequence[str]) -> None:
        """Ends a round's training of `sites`, scores its adapter there, and starts again."""
        spent = time.perf_counter() - self._since
        self._spent[round_index] = self._spent.get(round_index, 0.0) + spent
        scores = self._scores.setdefault(round_index, {})
        for name in sites:
            self._flows[name].load_adapter(tensors)
            scores[name] = self._flows[name].evaluate("validation").to_dict()
        self.start()

    def history(self, federation: Federation) -> list[dict[str, Any]]:
        """One {round, seconds, dice} a round; see `Outcome.history`."""
        lines, seconds = [], 0.0
        for round_index in sorted(self._spent):
            seconds += self._spent[round_index]
            dice = _site_means(self._scores[round_index].values(), federation)
            lines.append({"round": round_index, "seconds": round(seconds, 3), "dice": dice})
        return lines


def _site_means(
    scores: Iterable[Mapping[str, Any]], federation: Federation
) -> dict[str, float | None]:
    scores, means = list(scores), {}
    for name in (*federation.class_names, "mean"):
        mean = _site_mean(scores, name)
        means[name] = None if mean is None else round(mean, 4)
    return means


def _site_mean(scores: Iterable[Mapping[str, Any]], name: str) -> float | None:
    values = [score["dice"].get(name) for score in scores]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def run(
    mode: str,
    federation: Federation,
    data_root: Path,
    sites: Sequence[str],
    progress: Callable[[str], None] = lambda text: None,
    curve: bool = False,
) -> Outcome:
    """Trains in one of three modes and scores on every site's test cases.

    Args:
        mode: `federated`, `alone` (each site by itself, the same number of steps) or `pooled`
            (all training cases in one place, each volume with its own site's window).
        federation: the settings; `rounds` x `local_epochs` passes in every mode.
        data_root: folder in the layout of KiTS19.
        sites: names of the sites.
        progress: called with a line of text now and then.
        curve: score the validation cases after every round, for `Outcome.history`.

    Raises:
        ValueError: on an unknown mode.
    """
    from flap_nvflare.bundle.workflow import build_work

    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        flows = {
            name: build_work(federation, Site(name, data_root, state_dir=Path(folder)))
            for name in sites
        }
        track = Curve(flows) if curve else None
        if mode == "federated":
            models = {"federation": federate(flows, federation, Path(folder), progress, track)}
        elif mode == "alone":
            models = {
                name: _train_through(flow, progress, track, (name,)) for name, flow in flows.items()
            }
        elif mode == "pooled":
            joined = Site("+".join(sites), data_root, state_dir=Path(folder))
            pooled = build_work(federation, joined)
            models = {"pooled": _train_through(pooled, progress, track, sites)}
        else:
            raise ValueError(f"mode {mode!r} is not known; expected one of {MODES}")
        scores = {}
        for name, flow in flows.items():
            flow.load_adapter(models[name] if mode == "alone" else next(iter(models.values())))
            scores[name] = flow.evaluate("test").to_dict()
    seconds = time.perf_counter() - started
    history = [] if track is None else track.history(federation)
    return Outcome(mode, federation, models, scores, seconds, history)


def federate(
    flows: Mapping[str, Any],
    federation: Federation,
    folder: Path,
    progress: Callable[[str], None] = lambda text: None,
    curve: Curve | None = None,
) -> Tensors:
    """All rounds over the sites' workflows; returns the last adapter.

    With `curve` the adapter of every round is scored on the sites' validation cases. Optimiser
    moments go through files, as they do under FLARE.
    """
    from flap_nvflare.aggregation import Contribution, accumulator

    tensors, turned = next(iter(flows.values())).adapter(), False
    if curve is not None:
        curve.start()
    for round_index in range(federation.rounds):
        updates = accumulator(federation.rule)
        for name, flow in flows.items():
            flow.load_adapter(tensors)
            moments = folder / f"{name}.safetensors"
            if moments.is_file():
                flow.load_state(moments, reset_factors=turned)
            report = flow.train(round_index)
            flow.save_state(moments)
            weight = {"cases": report.cases, "slices": report.slices, "equal": 1}
            updates.add(Contribution(name, float(weight[federation.weight_by]), flow.adapter()))
            progress(f"round {round_index + 1} site {name} loss {report.loss:.4f}")
        result = updates.result()
        tensors, turned = dict(result.tensors), result.turned
        if curve is not None:
            curve.mark(round_index, tensors, tuple(flows))
    return tensors


def _train_through(
    flow: Any, progress: Callable[[str], None], curve: Curve | None, sites: Sequence[str]
) -> Tensors:
    """All rounds of one workflow, scored on the validation cases of `sites`."""
    if curve is not None:
        curve.start()
    for round_index in range(flow.federation.rounds):
        report = flow.train(round_index)
        progress(f"round {round_index + 1} site {flow.site.name} loss {report.loss:.4f}")
        if curve is not None:
            curve.mark(round_index, flow.adapter(), sites)
    return flow.adapter()
