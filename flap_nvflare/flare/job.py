"""The server's view of one job, shared by its components through FLARE's context."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.fl_context import FLContext

from flap_nvflare.adapter.guard import Refusal
from flap_nvflare.adapter.ledger import Ledger
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.aggregation.rule import Aggregate
from flap_nvflare.flare.context import read_federation, run_folder
from flap_nvflare.flare.run import BEST, LAST, RunFolder
from flap_nvflare.settings import CHECKPOINT_VARIABLE, Federation, SettingsError, Site

_JOB = "flap_server_job"


@dataclass
class ServerJob:
    """State of a job at the server.

    Attributes:
        federation: the settings that every task carries.
        folder: the run's durable folder.
        spec: names, shapes, method, rank and base of what travels.
        frozen: names of the base's parameters, which never travel.
        start_tensors: the adapter that the first round of this process starts from.
        start_round: rounds already finished.
        turned: whether the last aggregation turned the factors' basis.
        reports: what the sites said with the updates that counted in this round.
        refused: the updates that did not count in this round.
        aggregate: the last result of the rule.
        aggregation_seconds: what that took once the last update was in.
        ledger: bytes by round, site and direction.
        quorum: updates that must count for a round to stand.
        round_started: time stamp in seconds.
    """

    federation: Federation
    folder: RunFolder
    spec: UpdateSpec
    frozen: Collection[str]
    start_tensors: Mapping[str, torch.Tensor]
    start_round: int = 0
    turned: bool = False
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    aggregate: Aggregate | None = None
    aggregation_seconds: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)
    quorum: int = 1
    round_started: float = 0.0

    def begin_round(self) -> None:
        """Forgets what the last round's sites said."""
        self.reports, self.refused, self.aggregate = {}, [], None
        self.round_started = time.time()

    def validation_scores(self) -> dict[str, float]:
        """Mean validation Dice by site of the adapter that the round's sites received.

        By the sites' names, not by arrival, so that sums and files are the same each time.
        """
        scores = {
            site: report.get("dice", {}).get("mean")
            for site, report in sorted(self.reports.items())
        }
        return {site: float(score) for site, score in scores.items() if score is not None}

    @property
    def synthetic(self) -> bool | None:
        """Whether any site worked on the demo's phantoms; None before a site has answered."""
        lines = self.folder.rounds()
        reports = [figures for line in lines[-1:] for figures in line["sites"].values()]
        return any(report.get("synthetic") for report in reports) if reports else None

    def write_description(self, scores: Mapping[str, Any] | None = None) -> None:
        """Writes `run.json`: what ran, with which versions, on which data."""
        synthetic = self.synthetic
        self.folder.write_json(
            "run.json",
            {
                "run": self.run,
                "data": {None: "unknown", True: "synthetic", False: "sites' own"}[synthetic],
                "seed": self.federation.seed,
                "federation": self.federation.to_dict(),
                "base_sha256": self.spec.base_sha256,
                "parameters": self.spec.parameters,
                "bytes": {direction: self.ledger.total(direction) for direction in ("up", "down")},
                "rounds_finished": len(self.folder.rounds()),
                "finished": scores is not None,
                "versions": {
                    package: metadata.version(package)
                    for package in ("flap_nvflare", "torch", "nvflare", "monai", "segment-anything")
                },
            },
        )

    def round_line(self, round_index: int) -> dict[str, Any]:
        """The line of `rounds.jsonl` for the round that was just aggregated."""
        scores = self.validation_scores()
        sites = {}
        for site in sorted(self.reports):
            sites[site] = {
                **self.reports[site],
                "bytes_up": self.ledger.bytes(round_index, site, "up"),
                "bytes_down": self.ledger.bytes(round_index, site, "down"),
            }
        return {
            "round": round_index,
            "seconds": round(time.time() - self.round_started, 3),
            "validation_dice_received": sum(scores.values()) / len(scores) if scores else None,
            "aggregation_seconds": round(self.aggregation_seconds, 3),
            "aggregation_error": self.aggregate.error if self.aggregate else None,
            "sites": sites,
            "refused": [
                dataclasses.asdict(refusal)
                for refusal in sorted(self.refused, key=lambda one: (one.site, one.key, one.reason))
            ],
        }

    @property
    def run(self) -> str:
        """The run's name: job and time, under which sites keep their state."""
        return f"{self.folder.path.parent.name}/{self.folder.path.name}"


def open_job(fl_ctx: FLContext, name: str, changes: Mapping[str, Any] | None) -> ServerJob:
    """Reads the settings, builds the first adapter or loads the last, and shares the job."""
    federation = read_federation(fl_ctx, changes)
    spec, frozen, tensors = _first_adapter(federation)
    path, resumed = run_folder(name)
    job = ServerJob(federation, RunFolder(path), spec, frozen, tensors)
    if resumed:
        _go_on(job)
    fl_ctx.set_prop(_JOB, job, private=True, sticky=True)
    return job


def quorum_of(federation: Federation, sites: int) -> int:
    """Updates that must count for a round to stand, of `sites` sites.

    Raises:
        SettingsError: if `min_sites` asks for more sites than there are.
    """
    if federation.min_sites > sites:
        raise SettingsError(
            f"setting min_sites: {federation.min_sites} is more than the {sites} sites of this "
            f"run; lower it or start more sites"
        )
    return federation.min_sites or max(1, sites)


def server_job(fl_ctx: FLContext) -> ServerJob:
    """The job that `open_job` shared.

    Raises:
        RuntimeError: if the controller is not ours and opened none.
    """
    job = fl_ctx.get_prop(_JOB)
    if not isinstance(job, ServerJob):
        raise RuntimeError(
            "no open job: use flap_nvflare.flare.controller.FlapController as the job's workflow"
        )
    return job


def keep_best(
    job: ServerJob,
    tensors: Mapping[str, torch.Tensor],
    rounds: int,
    scores: Mapping[str, float],
) -> bool:
    """Keeps the adapter made by `rounds` rounds if its mean over sites beats the best so far.

    Only validation Dice of sites whose update counted goes in; test cases never do.
    """
    if not scores:
        return False
    best = job.folder.load(BEST, job.spec)
    known = best[1].get("scores", {}) if best is not None else {}
    shared = sorted(set(known) & set(scores))
    # Only sites that scored both: a round without a hard site is no better for that.
    if known and sum(scores[site] - known[site] for site in shared) <= 0:
        return False
    ordered = dict(sorted(scores.items()))
    score = sum(ordered.values()) / len(ordered)
    job.folder.save(BEST, tensors, job.spec, rounds=rounds, score=score, scores=ordered)
    return True


def _first_adapter(
    federation: Federation,
) -> tuple[UpdateSpec, Collection[str], dict[str, torch.Tensor]]:
    from flap_nvflare.bundle.builders import make_network
    from flap_nvflare.sam.tuning import trainable

    checkpoint = os.environ.get(CHECKPOINT_VARIABLE, "")
    network = make_network(federation, Site("server", Path(), checkpoint=checkpoint))
    tensors = {
        name: parameter.detach().to(torch.float32).clone()
        for name, parameter in trainable(network, federation.method).items()
    }
    spec = UpdateSpec.of(tensors, federation.method, federation.rank, network.base_sha256)
    frozen = frozenset(network.state_dict()) - set(tensors)
    return spec, frozen, tensors


def _go_on(job: ServerJob) -> None:
    saved = job.folder.load(LAST, job.spec)
    if saved is not None:
        tensors, extra = saved
        job.start_tensors = tensors
        job.start_round = int(extra["rounds"])
        job.turned = bool(extra["turned"])
    if job.start_round > job.federation.rounds:
        raise SettingsError(
            f"{job.folder.path}: {job.start_round} rounds are finished, but setting rounds is "
            f"{job.federation.rounds}; raise it or start a new run"
        )
    rounds = job.folder.rounds()
    job.folder.cut_rounds(job.start_round)
    for line in rounds[: job.start_round]:
        for site, figures in line["sites"].items():
            job.ledger.add(line["round"], site, "up", figures["bytes_up"])
            job.ledger.add(line["round"], site, "down", figures["bytes_down"])
