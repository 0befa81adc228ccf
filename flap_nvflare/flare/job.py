"""The server's view of one job, shared by its components through FLARE's context."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.fl_context import FLContext

from flap_nvflare.adapter.cipher import Cipher
from flap_nvflare.adapter.factors import of_rank
from flap_nvflare.adapter.guard import Refusal
from flap_nvflare.adapter.ledger import DIRECTIONS, Ledger
from flap_nvflare.adapter.links import Downlink
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.aggregation import least_sites
from flap_nvflare.aggregation.cut import strongest_first
from flap_nvflare.aggregation.rule import Aggregate
from flap_nvflare.aggregation.sampling import sampled_sites
from flap_nvflare.aggregation.server import ServerState
from flap_nvflare.bundle.trained import SETTINGS
from flap_nvflare.combinations import check
from flap_nvflare.flare.context import read_federation, run_folder
from flap_nvflare.flare.encryption import server_cipher
from flap_nvflare.flare.resume import STATE_PARTS, go_on, was_broken_off
from flap_nvflare.flare.run import BEST, LAST, RunFolder
from flap_nvflare.flare.trackers import receiver_class
from flap_nvflare.sam.tuning import Parts
from flap_nvflare.settings import CHECKPOINT_VARIABLE, Federation, SettingsError, Site

_JOB = "flap_server_job"
_MOST_REFUSALS = 16  # of one site in one round


@dataclass
class ServerJob:
    """State of a job at the server.

    Attributes:
        federation: the settings that every task carries.
        folder: the run's durable folder.
        spec: names, shapes, method, rank and base of what travels.
        frozen: names of the base's parameters, which never travel.
        fixed: factors of the adapter that stay as they are drawn, at every site alike.
        state: what the last round left.
        start_round: rounds already finished.
        parts: what trains, what travels, what stays.
        full_parameters: numbers that full fine-tuning would train and send.
        sites: names of all sites, sorted.
        downlink: the way down: what the sites hold.
        reports: what the sites said with the updates that counted in this round.
        refused: the updates that did not count in this round.
        failed: sites whose answer to this round's task does not count, with the reason.
        aggregate: what the rule made of this round; None until then.
        aggregation_seconds: what that took once the last update was in.
        cipher: the server's end of the encryption; None if updates come in the clear.
        ledger: bytes by round, site and direction.
        taking_part: the sites that train in this round.
        quorum: updates that must count for a round to stand.
        round_started: time stamp in seconds.
    """

    federation: Federation
    folder: RunFolder
    spec: UpdateSpec
    frozen: Collection[str]
    fixed: Mapping[str, torch.Tensor]
    parts: Parts
    state: ServerState
    start_round: int = 0
    full_parameters: int = 0
    sites: tuple[str, ...] = ()
    downlink: Downlink = field(default_factory=Downlink)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    aggregate: Aggregate | None = None
    aggregation_seconds: float = 0.0
    cipher: Cipher | None = None
    ledger: Ledger = field(default_factory=Ledger)
    taking_part: Sequence[str] = ()
    quorum: int = 1
    round_started: float = 0.0

    def begin_round(self, round_index: int) -> None:
        """Draws the round's sites, and forgets what the last round's sites said."""
        self.reports, self.refused, self.failed, self.aggregate = {}, [], {}, None
        self.downlink.prepare(self.state.tensors)
        self.taking_part = sampled_sites(self.federation, round_index, self.sites)
        self.round_started = time.time()

    @property
    def stored(self) -> UpdateSpec:
        """The spec of the adapters in the run's folder, which are sealed if updates are."""
        return self.spec if self.cipher is None else self.cipher.spec(self.spec)

    @property
    def personal(self) -> bool:
        """Whether a part of what trains stays at its site."""
        return bool(self.parts.stays) or self.parts.personal != "none"

    @property
    def unchanging(self) -> dict[str, torch.Tensor]:
        """What an adapter's file holds besides what trains; nothing beside sealed bytes."""
        return {} if self.cipher is not None else {**self.fixed, **self.state.offset}

    def expected(self, site: str, round_index: int) -> UpdateSpec:
        """What the site's update of the round must look like."""
        names = [name for name in self.spec.shapes if self.parts.up(name, round_index)]
        return self.spec.part(names, self.federation.rank_of(site))

    def received(self) -> ServerState:
        """The state as the sites hold it in this round."""
        return dataclasses.replace(self.state, tensors=self.downlink.held or self.state.tensors)

    def missing(self) -> list[str]:
        """Sites of the round from which no answer came, neither a good nor a bad one."""
        return sorted({*self.taking_part} - {*self.reports} - {*self.failed})

    def refuse(self, refusal: Refusal) -> None:
        """Notes an answer that does not count; of a site that floods the server, the first ones."""
        if sum(one.site == refusal.site for one in self.refused) < _MOST_REFUSALS:
            self.refused.append(refusal)

    def save_site(self, site: str, tensors: Mapping[str, torch.Tensor], round_index: int) -> None:
        """Writes a site's own adapter of the round: what it sent, the rest as it held it."""
        rank = self.federation.rank_of(site)
        spec = self.spec.part(self.spec.shapes, rank)
        whole = {**of_rank(self.received().tensors, rank), **tensors}
        if self.federation.site_ranks:  # a site of smaller rank takes the first directions
            whole = strongest_first(whole)
        frozen = {**self.fixed, **self.state.offset}
        self.save(f"sites/{site}", whole, spec, frozen, round=round_index)

    def save(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        spec: UpdateSpec,
        frozen: Mapping[str, torch.Tensor],
        **said: Any,
    ) -> None:
        """Writes an adapter of the run; its file names the settings that it was made with."""
        settings = {SETTINGS: self.federation.to_dict()}
        self.folder.save(name, tensors, spec, frozen, **said, **settings)

    def load_adapter(
        self, name: str, rank: int
    ) -> tuple[dict[str, torch.Tensor], UpdateSpec] | None:
        """An adapter of the run as it goes to a site, its change of the base with it."""
        spec = self.spec.part(self.spec.shapes, rank)
        saved = self.folder.load(name, self.stored.part(self.stored.shapes, rank))
        if saved is None:
            return None
        offset = {key: value for key, value in saved.frozen.items() if key not in self.fixed}
        return {**saved.tensors, **offset}, spec

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
                "sites": list(self.sites),
                "base_sha256": self.spec.base_sha256,
                "parameters": self.spec.parameters,
                "full_parameters": self.full_parameters,
                "bytes": {direction: self.ledger.total(direction) for direction in ("up", "down")},
                "rounds_finished": len(self.folder.rounds()),
                "finished": scores is not None,
                "validation_dice_last": {
                    site: by_model["last"]["validation"]["dice"]
                    for site, by_model in sorted((scores or {}).items())
                    if "validation" in by_model.get("last", {})
                },
                "versions": {
                    package: metadata.version(package)
                    for package in ("flap_nvflare", "torch", "nvflare", "monai", "segment-anything")
                },
            },
        )

    def round_line(self, round_index: int) -> dict[str, Any]:
        """The line of `rounds.jsonl` for the round that was just aggregated."""
        scores = self.validation_scores()
        count = self.ledger.bytes
        error = self.aggregate.error if self.aggregate else None  # nan of what is encrypted
        sites = {
            site: {
                **self.reports[site],
                "bytes_up": count(round_index, site, "up"),
                "bytes_down": count(round_index, site, "down"),
            }
            for site in sorted(self.reports)
        }
        return {
            "round": round_index,
            "seconds": round(time.time() - self.round_started, 3),
            "validation_dice_received": sum(scores.values()) / len(scores) if scores else None,
            "aggregation_seconds": round(self.aggregation_seconds, 3),
            "aggregation_error": error if error is not None and math.isfinite(error) else None,
            "excluded": list(self.aggregate.excluded) if self.aggregate else [],
            "taking_part": list(self.taking_part),
            "sites": sites,
            # Of all sites, those with them whose update did not count.
            "missing": self.missing(),
            "bytes": {
                site: {way: count(round_index, site, way) for way in DIRECTIONS}
                for site in self.ledger.sites(round_index)
            },
            "refused": [
                dataclasses.asdict(refusal)
                for refusal in sorted(self.refused, key=lambda one: (one.site, one.key, one.reason))
            ],
        }

    @property
    def run(self) -> str:
        """The run's name: job and time, under which sites keep their state."""
        return f"{self.folder.path.parent.name}/{self.folder.path.name}"


def open_job(
    fl_ctx: FLContext,
    name: str,
    changes: Mapping[str, Any] | None,
    sites: Sequence[str],
    resume: str = "auto",
) -> ServerJob:
    """Reads the settings, builds the first adapter or loads the last, and shares the job.

    Args:
        fl_ctx: FLARE's context.
        name: name of the job, the folder of its runs.
        changes: settings in place of the job's `federation.yaml`; None reads the file.
        sites: names of the sites that take part.
        resume: which run goes on, as `context.run_folder` takes it.

    Raises:
        SettingsError: if a setting is bad, or two of them make no sense together.
    """
    federation = read_federation(fl_ctx, changes)
    check(federation)
    receiver_class(federation.tracking)  # before anything is made: its package may be missing
    job = _first_job(federation, name, tuple(sorted(sites)))
    job.cipher = server_cipher(fl_ctx, federation)
    job.quorum = quorum_of(federation, len(sites))
    for site in sorted(set(federation.site_ranks) - set(sites)):
        raise SettingsError(f"setting site_ranks: {site!r} is no site of this run; it has {sites}")
    path, resumed = run_folder(fl_ctx, name, resume, lambda folder: was_broken_off(folder, job))
    job.folder = RunFolder(path)
    job.folder.hold()
    if resumed:
        go_on(job)
    fl_ctx.set_prop(_JOB, job, private=True, sticky=True)
    return job


def quorum_of(federation: Federation, sites: int) -> int:
    """Updates that must count for a round to stand, of `sites` sites.

    Raises:
        SettingsError: if `min_sites` or `sites_per_round` asks for more sites than there are, or
            the rule needs more than must count.
    """
    asked = federation.sites_per_round or sites
    for name in ("min_sites", "sites_per_round"):
        wanted = getattr(federation, name)
        if wanted > sites:
            raise SettingsError(
                f"setting {name}: {wanted} is more than the {sites} sites of this run; lower it "
                f"or start more sites"
            )
    quorum = federation.min_sites or max(1, asked)
    least = least_sites(federation.rule, federation.hostile)
    if quorum < least:
        raise SettingsError(
            f"setting rule: {federation.rule} with hostile: {federation.hostile} needs {least} "
            f"updates, but {quorum} would do (min_sites, sites_per_round, sites); raise them or "
            "lower hostile"
        )
    return quorum


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
    state: ServerState,
    rounds: int,
    scores: Mapping[str, float],
) -> bool:
    """Keeps the adapter made by `rounds` rounds if its mean over sites beats the best so far.

    Only validation Dice of sites whose update counted goes in; test cases never do.
    """
    if not scores:
        return False
    if job.personal:  # sites score with what they keep, which goes with the newest adapter alone
        _save_best(job, state, rounds, scores)
        return True
    best = job.folder.load(BEST, job.stored)
    known = best.extra.get("scores", {}) if best is not None else {}
    shared = sorted(set(known) & set(scores))
    # Only sites that scored both: a round without a hard site is no better for that.
    if known and sum(scores[site] - known[site] for site in shared) <= 0:
        return False
    _save_best(job, state, rounds, scores)
    return True


def _save_best(
    job: ServerJob, state: ServerState, rounds: int, scores: Mapping[str, float]
) -> None:
    ordered = dict(sorted(scores.items()))
    score = sum(ordered.values()) / len(ordered)
    frozen = {} if job.cipher is not None else {**job.fixed, **state.offset}
    job.save(BEST, state.tensors, job.stored, frozen, rounds=rounds, score=score, scores=ordered)


def _first_job(federation: Federation, name: str, sites: tuple[str, ...]) -> ServerJob:
    """The job before its first round: what every site draws from the seed, drawn here as well."""
    from flap_nvflare.bundle.builders import bundle_file, make_network, make_parts, shared_tensors
    from flap_nvflare.sam.tuning import LORA_SUFFIXES, fixed

    checkpoint = os.environ.get(CHECKPOINT_VARIABLE, "")
    here = Site("server", Path(), checkpoint=checkpoint, bundle=bundle_file())
    network = make_network(federation, here)
    parts = make_parts(federation)
    shared = shared_tensors(network, parts)
    return ServerJob(
        federation=federation,
        folder=RunFolder(Path()),
        spec=UpdateSpec.of(shared, federation.method, federation.rank, network.base_sha256),
        frozen=frozenset(network.state_dict()) - set(shared),
        fixed=fixed(network, parts),
        parts=parts,
        state=ServerState(shared),
        full_parameters=sum(
            parameter.numel()
            for name, parameter in network.named_parameters()
            if not name.endswith(LORA_SUFFIXES)
        ),
        sites=sites,
        downlink=Downlink(federation.download, shared),
    )


def save_round(job: ServerJob, round_index: int) -> None:
    """Writes what the round has made; the adapter's file, which counts the rounds, comes last."""
    # The line first: a kill between the two leaves a line that the resume cuts off.
    job.folder.append_round(job.round_line(round_index))
    state = job.state
    parts = dict(
        zip(STATE_PARTS, (state.control, state.memory, job.downlink.stored()), strict=True)
    )
    job.folder.save_state(
        round_index + 1,
        {prefix + name: value for prefix, part in parts.items() for name, value in part.items()},
        turned=state.turned,
    )
    job.save(LAST, state.tensors, job.stored, job.unchanging, rounds=round_index + 1)
    job.folder.drop_states(round_index + 1)
