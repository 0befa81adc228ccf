"""The federation and its baselines in one process, for tables.

The same workflow at each site and the same rule at the server as under FLARE, called in turn
without processes or messages; a test holds the adapter to FLARE's, bit for bit.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flap_nvflare.adapter.factors import of_rank
from flap_nvflare.adapter.links import Downlink, Uplink
from flap_nvflare.adapter.parcel import Parcel
from flap_nvflare.adapter.privacy import Mechanism
from flap_nvflare.aggregation import Contribution
from flap_nvflare.aggregation.sampling import sampled_sites
from flap_nvflare.aggregation.server import ServerRound, ServerState
from flap_nvflare.attack import attacked
from flap_nvflare.bundle.builders import first_adapter
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.seeds import derive_seed
from flap_nvflare.training.site_round import SiteRound

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
        wire: of a federation, what a round costs: {up, down: bytes of one site and round without
            FLARE's envelope, mean over both; full: bytes of full fine-tuning each way; error,
            seconds: mean relative error of the aggregates and of the rule's seconds}. Else empty.
        history: with `curve`, for each round {round, seconds, dice}: wall-clock of training and
            aggregation so far, all sites in turn, the first round's reading of the scans with
            it, and the validation Dice by class and `mean`, mean over sites. Empty without.
        elsewhere: by name of further data: Dice by class and `mean` on its sites' test cases,
            mean over its sites.
    """

    mode: str
    federation: Federation
    tensors: Mapping[str, Tensors]
    scores: Mapping[str, dict[str, Any]]
    seconds: float
    history: Sequence[dict[str, Any]] = ()
    wire: Mapping[str, float] = dataclasses.field(default_factory=dict)
    elsewhere: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)

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
            "mean": site_means(self.scores.values(), self.federation),
            "sites": {site: score["dice"] for site, score in self.scores.items()},
            "federation": self.federation.to_dict(),
        }
        if self.wire:
            values["wire"] = dict(self.wire)
        if self.elsewhere:
            values["elsewhere"] = {name: dict(dice) for name, dice in self.elsewhere.items()}
        return {**values, "history": list(self.history)} if self.history else values


class Curve:
    """Validation Dice against seconds of training, round by round.

    Args:
        flows: the sites' work by name, on whose validation cases the adapters are scored.
        load: gives an adapter to one of them.
    """

    def __init__(
        self,
        flows: Mapping[str, Any],
        load: Callable[[Any, Any], None] = lambda flow, tensors: flow.load_adapter(tensors),
    ) -> None:
        self._flows, self._load = flows, load
        self._spent: dict[int, float] = {}
        self._scores: dict[int, dict[str, dict[str, Any]]] = {}
        self._since = time.perf_counter()

    def start(self) -> None:
        """Training begins or goes on: what was done since the last `mark` does not count."""
        self._since = time.perf_counter()

    def mark(self, round_index: int, tensors: Any, sites: Sequence[str]) -> None:
        """Ends a round's training of `sites`, scores its adapter there, and starts again."""
        spent = time.perf_counter() - self._since
        self._spent[round_index] = self._spent.get(round_index, 0.0) + spent
        scores = self._scores.setdefault(round_index, {})
        for name in sites:
            self._load(self._flows[name], tensors)
            scores[name] = self._flows[name].evaluate("validation").to_dict()
        self.start()

    def history(self, federation: Federation) -> list[dict[str, Any]]:
        """One {round, seconds, dice} a round; see `Outcome.history`."""
        lines, seconds = [], 0.0
        for round_index in sorted(self._spent):
            seconds += self._spent[round_index]
            dice = site_means(self._scores[round_index].values(), federation)
            lines.append({"round": round_index, "seconds": round(seconds, 3), "dice": dice})
        return lines


def site_means(
    scores: Iterable[Mapping[str, Any]], federation: Federation
) -> dict[str, float | None]:
    """Mean over sites of each class's Dice and of their `mean`, to four digits; None without."""
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
    attacks: Mapping[str, str] | None = None,
    cache: Path | None = None,
    test_on: Mapping[str, Path] | None = None,
) -> Outcome:
    """Trains in one of three modes and scores on every site's test cases.

    Args:
        mode: `federated`, `alone` (each site by itself, the same number of steps) or `pooled`
            (all training cases in one place, each with its own site's grey values).
        federation: the settings; `rounds` x `local_epochs` passes in every mode.
        data_root: folder in a layout of `data.layouts`.
        sites: names of the sites.
        progress: called with a line of text now and then.
        curve: score the validation cases after every round, for `Outcome.history`.
        attacks: kind of attack by hostile site (`attack.ATTACKS`); only in a federation.
        cache: folder for prepared scans, which other runs on the same data may use again.
        test_on: further folders of scans by name, for `Outcome.elsewhere`; not with `alone`,
            whose adapters belong to their sites.

    Raises:
        ValueError: on an unknown mode, or settings that make no sense together.
    """
    from flap_nvflare.combinations import check
    from flap_nvflare.data.layouts import site_names

    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known; expected one of {MODES}")
    check(federation)
    if federation.encryption != "none":
        raise ValueError(
            f"encryption {federation.encryption!r}: a run in one process has nobody to hide from; "
            "run it under FLARE"
        )
    if test_on and mode == "alone":
        raise ValueError("test_on: of sites alone each adapter is meant for its own site")
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        disk = cache or Path(folder)
        flows = _flows(federation, data_root, sites, disk)
        others = {
            name: _flows(federation, root, site_names(root), disk)
            for name, root in (test_on or {}).items()
        }
        if mode == "federated":
            return _federated(
                federation, flows, others, Path(folder), progress, curve, attacks, started
            )
        joined = Site("+".join(sites), data_root, state_dir=disk)
        return _without_server(mode, federation, flows, others, joined, progress, curve, started)


def _flows(
    federation: Federation, data_root: Path, sites: Sequence[str], disk: Path
) -> dict[str, Any]:
    """The work of each site of a folder of scans."""
    from flap_nvflare.bundle.workflow import build_work

    return {name: build_work(federation, Site(name, data_root, state_dir=disk)) for name in sites}


def _without_server(
    mode: str,
    federation: Federation,
    flows: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]],
    joined: Site,
    progress: Callable[[str], None],
    curve: bool,
    started: float,
) -> Outcome:
    """Each site alone, or the pooled data of all as those of the site `joined`."""
    from flap_nvflare.bundle.workflow import build_work

    track = Curve(flows) if curve else None
    if mode == "alone":
        models = {
            name: _train_through(flow, progress, track, (name,)) for name, flow in flows.items()
        }
    else:
        pooled = build_work(federation, joined)
        models = {"pooled": _train_through(pooled, progress, track, tuple(flows))}

    def scored(there: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        scores = {}
        for name, flow in there.items():
            flow.load_adapter(models[name if mode == "alone" else "pooled"])
            scores[name] = flow.evaluate("test").to_dict()
        return scores

    scores = scored(flows)
    elsewhere = {
        name: site_means(scored(there).values(), federation) for name, there in others.items()
    }
    seconds = time.perf_counter() - started
    history = [] if track is None else track.history(federation)
    return Outcome(mode, federation, models, scores, seconds, history, elsewhere=elsewhere)


def _federated(
    federation: Federation,
    flows: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]],
    folder: Path,
    progress: Callable[[str], None],
    curve: bool,
    attacks: Mapping[str, str] | None,
    started: float,
) -> Outcome:
    rounds = {name: SiteRound(flow, folder / "sites" / name) for name, flow in flows.items()}
    track = Curve(rounds, show_adapter) if curve else None
    done = federate(rounds, federation, progress, track, attacks)
    scores = _scored(rounds, done.state)
    elsewhere = {}
    for other, its_flows in others.items():
        there = {
            name: SiteRound(flow, folder / "elsewhere" / other / name)
            for name, flow in its_flows.items()
        }
        elsewhere[other] = site_means(_scored(there, done.state).values(), federation)
    return Outcome(
        mode="federated",
        federation=federation,
        tensors={"federation": dict(done.state.tensors)},
        scores=scores,
        elsewhere=elsewhere,
        seconds=time.perf_counter() - started,
        history=[] if track is None else track.history(federation),
        wire=_wire(federation, done.rounds),
    )


def _scored(sites: Mapping[str, SiteRound], state: ServerState) -> dict[str, dict[str, Any]]:
    """Scores of the federation's adapter on each site's test cases."""
    scores = {}
    for name, site in sites.items():
        show_adapter(site, state.parcel())
        scores[name] = site.evaluate("test").to_dict()
    return scores


def show_adapter(site: SiteRound, adapter: Parcel) -> None:
    """Gives a site the federation's adapter to score."""
    site.receive(
        adapter.tensors,
        round_index=site.work.federation.rounds,
        turned=True,
        offset=adapter.offset,
        control=adapter.control,
    )


def _wire(federation: Federation, rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from flap_nvflare.sam.tuning import count

    sizes = count(federation.arch, federation.image_size, federation.classes, federation.rank)
    messages = sum(one["messages"] for one in rounds)
    return {
        "up": sum(one["up"] for one in rounds) / messages,
        "down": sum(one["down"] for one in rounds) / messages,
        "full": next(one.bytes for one in sizes if one.method == "full"),
        "error": statistics.fmean(one["error"] for one in rounds),
        "seconds": statistics.fmean(one["seconds"] for one in rounds),
    }


@dataclasses.dataclass(frozen=True)
class Federated:
    """What the rounds of a federation gave.

    Attributes:
        state: the server's last state.
        rounds: of each round {error, seconds, up, down}: relative error of the aggregate, seconds
            of the rule once the last update was in, and bytes of all sites' updates and adapters
            as they would travel, without FLARE's envelope.
    """

    state: ServerState
    rounds: Sequence[dict[str, Any]]


def federate(
    sites: Mapping[str, SiteRound],
    federation: Federation,
    progress: Callable[[str], None] = lambda text: None,
    curve: Curve | None = None,
    attacks: Mapping[str, str] | None = None,
) -> Federated:
    """All rounds over the sites; every update and adapter goes through the stages of its way.

    Args:
        sites: the sites by name.
        federation: the settings.
        progress: called with a line of text now and then.
        curve: if given, the adapter of every round is scored on the sites' validation cases.
        attacks: kind of attack by hostile site, see `attack.ATTACKS`.
    """
    first = next(iter(sites.values())).work
    state, lines = ServerState(first_adapter(federation, first.site)), []
    downlink = Downlink(federation.download, state.tensors)
    uplinks = {name: Uplink(federation.upload) for name in sites}
    if curve is not None:
        curve.start()
    for index in range(federation.rounds):
        downlink.prepare(state.tensors)
        server = ServerRound(federation, index, state, downlink.held)
        line = {"round": index, "messages": 0, "up": 0, "down": 0}
        for name in sampled_sites(federation, index, tuple(sites)):
            site, held = sites[name], of_rank(downlink.held, federation.rank_of(name))
            down = downlink.message(name)
            site.receive(
                downlink.held,
                round_index=index,
                turned=state.turned,
                offset=state.offset,
                control=state.control,
            )
            report = site.train(index)
            update, change = site.update(), site.control_change()
            site.save(index)
            if attacks and name in attacks:
                seed = derive_seed(federation.seed, name, index, "attack")
                update = attacked(attacks[name], update, held, seed)
            if federation.dp_clip:
                update = _private(federation, name, index, held, update)
            up, update = uplinks[name].send(update, held, state.turned)
            downlink.answered(name)
            weight = federation.weight_of(report.cases, report.slices)
            server.add(Contribution(name, weight, update), report.steps, change)
            line["messages"] += 1
            line["up"] += _bytes(up, update) + _bytes(None, change)
            line["down"] += _bytes(down, downlink.held)
            line["down"] += _bytes(None, {**state.offset, **state.control})
            progress(f"round {index + 1} site {name} loss {report.loss:.4f}")
        started = time.perf_counter()
        state, found = server.result(len(sites))
        seconds = time.perf_counter() - started
        lines.append({**line, "error": found.error, "seconds": seconds})
        if curve is not None:
            curve.mark(index, state.parcel(), tuple(sites))
    return Federated(state, lines)


def _private(
    federation: Federation, site: str, round_index: int, start: Tensors, update: Tensors
) -> Tensors:
    """The update as differential privacy lets it go; its noise comes from the seed."""
    seed = derive_seed(federation.seed, site, round_index, "privacy")
    mechanism = Mechanism(federation.dp_clip, federation.dp_noise, seed)
    return mechanism.release({name: start[name] for name in update}, update)


def _bytes(message: bytes | None, tensors: Mapping[str, torch.Tensor]) -> int:
    """Of a coded message, or of plain tensors."""
    if message is not None:
        return len(message)
    return sum(tensor.nbytes for tensor in tensors.values())


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
