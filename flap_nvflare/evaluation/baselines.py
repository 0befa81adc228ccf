"""What a federation is compared with, trained with exactly its settings: sites alone, all scans in
one place, and the federation without a site.

Each is a folder in `RUN/baselines` with `adapter_best.safetensors`, chosen on validation cases as
the run's own best is, and is used again by the next evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flap_nvflare.adapter.parcel import Parcel
from flap_nvflare.adapter.update import UpdateSpec, load_update, save_update, write_atomic
from flap_nvflare.aggregation import least_sites
from flap_nvflare.bundle.alone import Alone
from flap_nvflare.bundle.trained import BEST_FILE, LAST_FILE, SETTINGS
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.in_process import Curve, federate, show_adapter
from flap_nvflare.settings import Federation, SettingsError, Site
from flap_nvflare.training.site_data import POOL
from flap_nvflare.training.site_round import SiteRound

FOLDER = "baselines"
MADE_WITH = "made_with.json"
Disk = Callable[[str], Site]
Told = Callable[[float], None]  # share of the training that is done, from 0 to 1


@dataclass(frozen=True)
class Baseline:
    """One training that the federation is compared with.

    Attributes:
        name: its name, and that of its folder.
        kind: `local`, `pooled` or `left_out`, see `models.KINDS`.
        trained_on: the sites whose training cases it sees.
    """

    name: str
    kind: str
    trained_on: tuple[str, ...]


def baselines(
    sites: Sequence[str], local: Sequence[str], pooled: bool, left_out: Sequence[str]
) -> list[Baseline]:
    """The trainings that were asked for.

    Args:
        sites: the sites of the federation.
        local: sites that train alone.
        pooled: whether all scans train in one place.
        left_out: sites that the federation does without, one at a time.

    Raises:
        SettingsError: if a site is none of the federation's or no name of a folder, or no other
            would be left.
    """
    for site in (*local, *left_out):
        if site not in sites:
            raise SettingsError(f"site {site!r} is none of this run's: {', '.join(sites)}")
        if Path(site).name != site:  # run.json may come from elsewhere
            raise SettingsError(f"site {site!r} would lead out of {FOLDER}/; rename the site")
    if left_out and len(sites) < 2:
        raise SettingsError(f"--leave-one-out: without {sites[0]} no site would be left to train")
    found = [Baseline(f"local_{site}", "local", (site,)) for site in local]
    if pooled:
        found.append(Baseline("pooled", "pooled", tuple(sites)))
    for site in left_out:
        others = tuple(other for other in sites if other != site)
        found.append(Baseline(f"without_{site}", "left_out", others))
    return found


def train(baseline: Baseline, federation: Federation, disk: Disk, folder: Path, told: Told) -> Path:
    """The file of the baseline's adapter, trained unless the folder holds it already.

    A training of a site alone or of pooled scans that was cut off goes on after its last round; a
    federation without a site begins anew.

    Args:
        baseline: what to train.
        federation: the run's settings.
        disk: a site's disk by its name, names joined by `+` for pooled ones.
        folder: where it is kept.
        told: told of progress.

    Raises:
        SettingsError, DataError: as `claim`, and what training raises.
    """
    claim(baseline, federation, disk, folder)
    if not _done(folder, federation.rounds):
        if baseline.kind == "left_out":
            _federate(baseline, federation, disk, folder, told)
        else:
            work = build_work(federation, disk(POOL.join(baseline.trained_on)))
            Alone(work, folder).train(resume=True, progress=_steps(federation.rounds, told))
    best = folder / BEST_FILE  # none without validation cases: the last counts, as in a run
    return best if best.is_file() else folder / LAST_FILE


def claim(baseline: Baseline, federation: Federation, disk: Disk, folder: Path) -> None:
    """Writes down what the baseline is made with, or checks that the folder's was made with it.

    Reads the names and sizes of scans and no more, so that hours of training fail at once.

    Raises:
        SettingsError: if the folder holds what was made otherwise, or the run's settings make no
            sense without a site.
        DataError: if a site's cases are not in the data.
    """
    _check(baseline, federation)
    ours: dict[str, Any] = {
        "trained_on": list(baseline.trained_on),
        "cases_sha256": _cases_sha256(baseline, federation, disk),
        "federation": federation.to_dict(),
    }
    path = folder / MADE_WITH
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(ours, indent=2) + "\n").encode())
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["federation"] = Federation.whole(found["federation"])
        what = next((name for name in ours if found.get(name) != ours[name]), None)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise SettingsError(f"{path}: is damaged ({error}); remove the folder") from error
    if what is not None:
        raise SettingsError(
            f"{folder}: was made with another {what} than the run and --data-root have now; "
            "remove the folder to train it again"
        )


def _check(baseline: Baseline, federation: Federation) -> None:
    """Whether the run's settings make sense for a federation without a site.

    Raises:
        SettingsError: naming the setting.
    """
    if baseline.kind != "left_out":
        return
    without = f"--leave-one-out: {baseline.name}"
    least = least_sites(federation.rule, federation.hostile)
    if len(baseline.trained_on) < least:
        raise SettingsError(
            f"{without}: rule {federation.rule} with hostile: {federation.hostile} needs {least} "
            f"sites, and {len(baseline.trained_on)} would be left"
        )


def _done(folder: Path, rounds: int) -> bool:
    """Whether the last round's adapter is there; it is written after the best one."""
    last = folder / LAST_FILE
    return last.is_file() and int(json.loads(load_update(last)[2]["round"])) == rounds - 1


def _cases_sha256(baseline: Baseline, federation: Federation, disk: Disk) -> str:
    """Hash of names and sizes of the training and validation cases; reads no scan."""
    from flap_nvflare.data.source import read_cases

    share, seed = federation.validation_fraction, federation.seed
    stamps = []
    for name in baseline.trained_on:
        site = disk(name)
        cases = read_cases(site.data_root, name, share, seed, site.data_source)
        for case in (*cases.train, *cases.validation):
            sizes = [path.stat().st_size for path in (case.image, case.label)]
            stamps.append([name, case.name, *sizes])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _steps(rounds: int, told: Told) -> Callable[[dict[str, Any]], None]:
    def tell(figures: dict[str, Any]) -> None:
        told((figures["round"] + figures["step"] / figures["steps"]) / rounds)

    return tell


class _Best(Curve):
    """Keeps the adapter of the round with the best validation Dice, as a run's server does."""

    def __init__(self, sites: Mapping[str, SiteRound]) -> None:
        super().__init__(sites, show_adapter)
        self.adapter: Parcel | None = None
        self.round = 0
        self._dice = -1.0

    def mark(self, round_index: int, tensors: Parcel, sites: Sequence[str]) -> None:
        """Scores the round's adapter."""
        super().mark(round_index, tensors, sites)
        found = [score["dice"]["mean"] for score in self._scores[round_index].values()]
        known = [dice for dice in found if dice is not None]
        if known and sum(known) / len(known) > self._dice:
            self._dice = sum(known) / len(known)
            self.adapter, self.round = tensors, round_index


def _federate(
    baseline: Baseline, federation: Federation, disk: Disk, folder: Path, told: Told
) -> None:
    """Trains the federation in this process and writes its best and last adapter."""
    with TemporaryDirectory() as memory:
        sites = {
            name: SiteRound(build_work(federation, disk(name)), Path(memory) / name)
            for name in baseline.trained_on
        }
        of_a_round = min(federation.sites_per_round or len(sites), len(sites))
        count = itertools.count(1)

        def told_of_a_site(text: str) -> None:
            told(next(count) / (federation.rounds * of_a_round))

        # A personal adapter goes with the newest shared one alone: then the last is the best.
        best = None if federation.personal != "none" else _Best(sites)
        state = federate(sites, federation, told_of_a_site, best).state
    base = next(iter(sites.values())).work.network.base_sha256
    if best is not None and best.adapter is not None:
        _save(folder / BEST_FILE, best.adapter, federation, base, best.round)
    _save(folder / LAST_FILE, state.parcel(), federation, base, federation.rounds - 1)


def _save(
    path: Path, adapter: Parcel, federation: Federation, base_sha256: str, round_index: int
) -> None:
    whole = {**adapter.tensors, **adapter.offset}
    spec = UpdateSpec.of(whole, federation.method, federation.rank, base_sha256)
    # As a run's file: the settings without ranks of single sites, which the adapter does not have.
    settings = dataclasses.replace(federation, site_ranks={})
    said = {"round": round_index, SETTINGS: settings.to_dict()}
    save_update(path, whole, spec, {key: json.dumps(value) for key, value in said.items()})
