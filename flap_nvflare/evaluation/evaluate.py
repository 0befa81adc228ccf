"""An evaluation from beginning to end: models, baselines, scores, summary, files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from flap_nvflare.bundle.builders import make_site
from flap_nvflare.bundle.trained import weights_file
from flap_nvflare.data.cases import is_synthetic
from flap_nvflare.data.layouts import site_names
from flap_nvflare.evaluation import baselines
from flap_nvflare.evaluation.models import (
    FEDERATED,
    Model,
    Run,
    check_settings,
    read_model,
    read_models,
    read_run,
)
from flap_nvflare.evaluation.pictures import Pictures
from flap_nvflare.evaluation.scoring import Scores, count_cases, score
from flap_nvflare.evaluation.summary import Bootstrap, collaborative_gain, summarise
from flap_nvflare.prediction.cases import require_writable
from flap_nvflare.settings import SettingsError, Site

FORMAT = "flap_nvflare.evaluation.1"
SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Asked:
    """What an evaluation is to do.

    Attributes:
        path: a run's folder, or an adapter's file.
        data_root: folder with the scans.
        sites: sites whose cases are scored; empty for the run's, or of an adapter all in the data.
        split: one of `SPLITS`.
        checkpoint: SAM's official file; empty as in `bundle.trained.weights_file`.
        checkpoint_sha256: the only base accepted; empty for the one that the adapter names.
        device: `cpu`, `cuda`, `cuda:1` or `auto`.
        tolerance: mm of the normalised surface Dice.
        local, pooled: whether these baselines are trained and scored.
        left_out: sites that the federation is trained without; None for none, empty for every one.
        pictures: cases to draw of each site.
        bootstrap: how the intervals are made.
    """

    path: Path
    data_root: Path
    sites: tuple[str, ...] = ()
    split: str = "test"
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    device: str = "auto"
    tolerance: float = 2.0
    local: bool = False
    pooled: bool = False
    left_out: tuple[str, ...] | None = None
    pictures: int = 0
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise SettingsError(f"split {self.split!r} is unknown; choose one of {SPLITS}")
        if not 0 < self.tolerance < 1000:
            raise SettingsError(f"tolerance {self.tolerance:g} mm: give a number above 0")
        if self.pictures < 0:
            raise SettingsError(f"pictures: {self.pictures} is less than none")

    @property
    def compares(self) -> bool:
        """Whether anything has to be trained."""
        return self.local or self.pooled or self.left_out is not None


class Listener(Protocol):
    """Told of progress."""

    def task(self, name: str, total: float) -> None:
        """Something that takes `total` steps begins; what came before has ended."""

    def done(self, steps: float, what: str) -> None:
        """So many more steps of it are done, the last of them on `what`."""

    def reached(self, steps: float) -> None:
        """So many steps of it are done in all."""


def evaluate(asked: Asked, folder: Path, listener: Listener) -> dict[str, Any]:
    """Trains what is missing, scores everything, and returns what `evaluation.json` holds.

    While baselines train, prepared scans are kept in a temporary folder (below TMPDIR) that only
    its owner can read, and are gone at the end; nothing is sent anywhere.

    Args:
        asked: what to do.
        folder: where pictures are drawn.
        listener: told of progress.

    Raises:
        UpdateError, SettingsError, OtherBaseError, CheckpointError, DataError: naming file, value
            and mend.
    """
    run = read_run(asked.path)
    sites = _sites(asked, run)
    base = (asked.checkpoint, asked.checkpoint_sha256)
    models = read_models(asked.path, run, *base)
    # Without ranks of single sites: every adapter is scored at its whole rank.
    settings = models[0].federation if run is None else run.federation
    federation = dataclasses.replace(settings, site_ranks={})
    with _disks(asked, weights_file(federation, asked.checkpoint)) as disk:
        cases = count_cases(sites, disk, federation, asked.split)
        require_writable(folder)
        if asked.compares:
            models += _compared(asked, run, sites, disk, base, listener)
        listener.task("scoring", cases * len(models))
        pictures = Pictures(folder, asked.pictures, tuple(federation.class_names))
        scores, drawn = score(
            models,
            sites,
            disk,
            federation,
            asked.split,
            asked.tolerance,
            pictures,
            lambda what: listener.done(1, what),
        )
    return {
        "format": FORMAT,
        "synthetic": bool(run and run.synthetic) or is_synthetic(asked.data_root),
        "class_names": list(federation.class_names),
        "split": asked.split,
        "tolerance_mm": asked.tolerance,
        "bootstrap": dataclasses.asdict(asked.bootstrap),
        "base_sha256": models[0].base_sha256,
        "notes": notes(run),
        "models": {
            model.name: _described(model, scores[model.name], asked.bootstrap) for model in models
        },
        **_beside_local(models, scores, asked.bootstrap),
        "pictures": [picture.to_dict() for picture in drawn],
    }


def notes(run: Run | None) -> list[str]:
    """What a reader of the figures must know of the run."""
    found = []
    if run is not None and not run.finished:
        found.append("The run has not come to its end; these are its adapters so far.")
    if run is not None and run.federation.personal == "ditto":
        found.append(
            "personal: ditto. What is scored is the shared adapter; the sites' own adapters, which "
            "they would use and which cross_site.json scores as 'last', never leave them."
        )
    if run is not None and run.federation.site_ranks:
        found.append(
            "site_ranks: every adapter is scored at its whole rank, also at sites that train with "
            "a smaller one."
        )
    return found


@contextmanager
def _disks(asked: Asked, checkpoint: str) -> Iterator[baselines.Disk]:
    """A site's disk by its name; where baselines train, with a place for prepared scans, which
    several of them read, while it lasts."""
    with TemporaryDirectory(prefix="flap_evaluation_") as cache:

        def disk(name: str) -> Site:
            site = make_site(
                name,
                asked.data_root,
                checkpoint_sha256=asked.checkpoint_sha256,
                device=asked.device,
            )
            # Not what the environment names for a network that needs no such file.
            site = dataclasses.replace(site, checkpoint=checkpoint)
            return dataclasses.replace(site, state_dir=Path(cache)) if asked.compares else site

        yield disk


def _sites(asked: Asked, run: Run | None) -> tuple[str, ...]:
    """The sites to score: those asked for, else the run's, else all of the data's table.

    Raises:
        SettingsError: if one is not in the table under that very name, by which it is compared
            with those that trained.
    """
    wanted = tuple(dict.fromkeys(asked.sites)) or (() if run is None else run.sites)
    if make_site("any", asked.data_root).data_source is not None:
        if not wanted:
            raise SettingsError("a site's own code lists the data: name the sites by --sites")
        return wanted
    known = site_names(asked.data_root)
    for name in wanted:
        if name not in known:
            raise SettingsError(
                f"site {name!r} is none of the data's {', '.join(known)}; name some by --sites"
            )
    return wanted or tuple(known)


def _compared(
    asked: Asked,
    run: Run | None,
    sites: Sequence[str],
    disk: baselines.Disk,
    base: tuple[str, str],
    listener: Listener,
) -> list[Model]:
    """The baselines, trained where they are missing."""
    if run is None:
        raise SettingsError(
            f"{asked.path}: --local, --pooled and --leave-one-out train with a run's settings; "
            "name the folder of a run, with its run.json"
        )
    ours = [site for site in sites if site in run.sites]
    left_out = () if asked.left_out is None else (asked.left_out or ours)
    wanted = baselines.baselines(run.sites, ours if asked.local else (), asked.pooled, left_out)
    folder = run.folder / baselines.FOLDER
    for one in wanted:  # before hours of training
        baselines.claim(one, run.federation, disk, folder / one.name)
    models = []
    for one in wanted:
        listener.task(f"training {one.name}", 1.0)
        file = baselines.train(one, run.federation, disk, folder / one.name, listener.reached)
        model = read_model(one.name, one.kind, one.trained_on, file, *base)
        check_settings(model, run)
        models.append(model)
    return models


def _described(model: Model, scores: Any, bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "kind": model.kind,
        "trained_on": list(model.trained_on),
        "adapter": model.file.name,
        "sha256": model.sha256,
        "sites": {
            site: {
                **score.to_dict(),
                "seen": site in model.trained_on if model.trained_on else None,
            }
            for site, score in scores.items()
        },
        "summary": _plain(summarise(scores, bootstrap)),
    }


def _beside_local(models: Sequence[Model], scores: Scores, bootstrap: Bootstrap) -> dict[str, Any]:
    """Every site by its own adapter as if they were one model, and the federation's gain."""
    alone = {
        site: scores[model.name][site]
        for model in models
        if model.kind == "local"
        for site in model.trained_on
    }
    if not alone:
        return {"collaborative_gain": None, "local_only": None}
    gain = collaborative_gain(scores[FEDERATED], alone)
    return {
        "collaborative_gain": {"reference": "local", "model": FEDERATED, **gain},
        "local_only": {"summary": _plain(summarise(alone, bootstrap))},
    }


def _plain(summary: Any) -> dict[str, Any]:
    return {
        name: {column: figure.to_dict() for column, figure in by_class.items()}
        for name, by_class in summary.items()
    }
