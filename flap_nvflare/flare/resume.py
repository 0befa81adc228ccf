"""Going on with a run that was broken off: which one it is, and what comes back of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_nvflare.adapter.ledger import DIRECTIONS
from flap_nvflare.aggregation.server import ServerState
from flap_nvflare.flare.run import LAST, RunFolder
from flap_nvflare.settings import RESUME_VARIABLE, Federation, SettingsError

if TYPE_CHECKING:
    from flap_nvflare.flare.job import ServerJob

STATE_PARTS = ("control/", "memory/", "held/")  # of the server's state, by their names' beginnings

# What may differ between a run and its continuation: who waits for whom, what is scored and shown.
_MAY_CHANGE = {
    "rounds",
    "min_sites",
    "train_timeout",
    "straggler_wait",
    "cross_site",
    "threads",
    "tracking",
}


def go_on(job: ServerJob) -> None:
    """Takes up the run in the job's folder after its last whole round.

    Raises:
        SettingsError: if the settings are not those of the run.
        UpdateError: if a file is missing, damaged or of other settings.
    """
    _check_same_settings(job)
    saved = job.folder.load(LAST, job.stored)
    if saved is not None:
        job.start_round = int(saved.extra["rounds"])
        memory, extra = job.folder.load_state(job.start_round)
        parts = {
            prefix: {
                name.removeprefix(prefix): tensor
                for name, tensor in memory.items()
                if name.startswith(prefix)
            }
            for prefix in STATE_PARTS
        }
        job.state = ServerState(
            tensors=saved.tensors,
            offset={key: value for key, value in saved.frozen.items() if key not in job.fixed},
            control=parts["control/"],
            memory=parts["memory/"],
            turned=bool(extra["turned"]),
        )
        job.downlink.restore(parts["held/"])
    if job.start_round > job.federation.rounds:
        raise SettingsError(
            f"{job.folder.path}: {job.start_round} rounds are finished, but setting rounds is "
            f"{job.federation.rounds}; raise it or start a new run"
        )
    rounds = job.folder.rounds()
    job.folder.cut_rounds(job.start_round)
    for line in rounds[: job.start_round]:
        for site, figures in line["bytes"].items():
            for direction in DIRECTIONS:
                job.ledger.add(line["round"], site, direction, figures[direction])


def _check_same_settings(job: ServerJob) -> None:
    made_with = _description(job.folder.path)["federation"]
    for name in _differences(job.federation, made_with):
        raise SettingsError(
            f"setting {name}: {getattr(job.federation, name)!r}, but {job.folder.path} was made "
            f"with {Federation.whole(made_with)[name]!r}; restore it or start a new run"
        )


def _differences(federation: Federation, made_with: Mapping[str, Any]) -> list[str]:
    """Settings in which a run differs from its continuation and may not."""
    ours, theirs = federation.to_dict(), Federation.whole(made_with)
    return [name for name in sorted(ours.keys() - _MAY_CHANGE) if theirs[name] != ours[name]]


def was_broken_off(folder: Path, job: ServerJob) -> bool:
    """Whether the job goes on in the folder: a run of its settings and sites that nobody writes.

    At least one round must be finished. Where all are, and only the scores are missing, it goes
    on as well. The run is held from then on.

    Raises:
        SettingsError: if it is this job's run, but some of its sites are not here and setting
            `min_sites` does not say that the others suffice.
    """
    run = RunFolder(folder)
    try:
        run.hold(seconds=0.0)
    except TimeoutError:  # of a job that runs
        return False
    try:
        known = _description(folder)  # read only now: its job may have just finished it
        fits = (
            known["finished"] is False
            and known["base_sha256"] == job.spec.base_sha256
            and not _differences(job.federation, known["federation"])
            and set(job.sites) <= set(known["sites"])
            and 0 < len(run.rounds()) <= job.federation.rounds
            and run.adapter_path(LAST).is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):  # it was cut off before it was written
        fits = False
    if not fits:
        run.release()
        return False
    absent = sorted(set(known["sites"]) - set(job.sites))
    if absent and not job.federation.min_sites:
        run.release()
        raise SettingsError(
            f"{folder}: broken off with the sites {known['sites']}, of which {absent} are not "
            f"connected; start them and submit the job again, or set min_sites to "
            f"{len(job.sites)} to go on without them, or {RESUME_VARIABLE}=new to start anew"
        )
    return True


def _description(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
