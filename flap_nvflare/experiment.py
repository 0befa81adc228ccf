"""The federation and its baselines in one process, for tables.

The same workflow at each site and the same rule at the server as under FLARE, called in turn
without processes or messages; a test holds the adapter to FLARE's, bit for bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
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
    """

    mode: str
    federation: Federation
    tensors: Mapping[str, Tensors]
    scores: Mapping[str, dict[str, Any]]
    seconds: float

    def mean_dice(self, name: str = "mean") -> float:
        """Mean over sites of class `name` or of the classes' mean; sites without are left out."""
        values = [score["dice"].get(name) for score in self.scores.values()]
        known = [value for value in values if value is not None]
        return sum(known) / len(known)

    def to_dict(self) -> dict[str, Any]:
        """Plain values without tensors."""
        return {
            "mode": self.mode,
            "method": self.federation.method,
            "seed": self.federation.seed,
            "parameters": sum(t.numel() for t in next(iter(self.tensors.values())).values()),
            "seconds": round(self.seconds, 1),
            "mean": {
                name: round(self.mean_dice(name), 4)
                for name in (*self.federation.class_names, "mean")
            },
            "sites": {site: score["dice"] for site, score in self.scores.items()},
            "federation": self.federation.to_dict(),
        }


def run(
    mode: str,
    federation: Federation,
    data_root: Path,
    sites: Sequence[str],
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Trains in one of three modes and scores on every site's test cases.

    Args:
        mode: `federated`, `alone` (each site by itself, the same number of steps) or `pooled`
            (all training cases in one place, each volume with its own site's window).
        federation: the settings; `rounds` x `local_epochs` passes in every mode.
        data_root: folder in the layout of KiTS19.
        sites: names of the sites.
        progress: called with a line of text now and then.

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
        if mode == "federated":
            models = {"federation": federate(flows, federation, Path(folder), progress)}
        elif mode == "alone":
            models = {name: _train_through(flow, progress) for name, flow in flows.items()}
        elif mode == "pooled":
            pooled = build_work(federation, Site("+".join(sites), data_root))
            models = {"pooled": _train_through(pooled, progress)}
        else:
            raise ValueError(f"mode {mode!r} is not known; expected one of {MODES}")
        scores = {}
        for name, flow in flows.items():
            flow.load_adapter(models[name] if mode == "alone" else next(iter(models.values())))
            scores[name] = flow.evaluate("test").to_dict()
    return Outcome(mode, federation, models, scores, time.perf_counter() - started)


def federate(
    flows: Mapping[str, Any],
    federation: Federation,
    folder: Path,
    progress: Callable[[str], None] = lambda text: None,
) -> Tensors:
    """All rounds over the sites' workflows; returns the last adapter.

    Optimiser moments go through files, as they do under FLARE.
    """
    from flap_nvflare.aggregation import Contribution, accumulator

    tensors, turned = next(iter(flows.values())).adapter(), False
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
    return tensors


def _train_through(flow: Any, progress: Callable[[str], None]) -> Tensors:
    for round_index in range(flow.federation.rounds):
        report = flow.train(round_index)
        progress(f"round {round_index + 1} site {flow.site.name} loss {report.loss:.4f}")
    return flow.adapter()
