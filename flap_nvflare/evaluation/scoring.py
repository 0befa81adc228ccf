"""Every model on every site's cases, one site in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.data.errors import DataError
from flap_nvflare.evaluation.baselines import Disk
from flap_nvflare.evaluation.models import Model
from flap_nvflare.evaluation.pictures import Picture, Pictures
from flap_nvflare.settings import Federation
from flap_nvflare.training.scores import CaseScore, SiteScore
from flap_nvflare.training.site_data import SiteData

if TYPE_CHECKING:
    from torch import Tensor

    from flap_nvflare.data.prepared import Prepared
    from flap_nvflare.training.volume_scorer import OnCase

Scores = dict[str, dict[str, SiteScore]]


def count_cases(sites: Sequence[str], disk: Disk, federation: Federation, split: str) -> int:
    """Cases of the split at all sites; reads names, no scan.

    Raises:
        DataError: if a site is not in the data, or has no such case.
    """
    total = 0
    for name in sites:
        count = len(getattr(SiteData(federation, disk(name)).cases, split))
        if not count:
            raise DataError(
                f"site {name} has no {split} case to score; leave it out by --sites, or choose "
                "another --split"
            )
        total += count
    return total


def score(
    models: Sequence[Model],
    sites: Sequence[str],
    disk: Disk,
    federation: Federation,
    split: str,
    tolerance: float,
    pictures: Pictures,
    told: Callable[[str], None],
) -> tuple[Scores, list[Picture]]:
    """Scores by model and site, and the pictures of the first model.

    Args:
        models: what to score.
        sites: on whose cases.
        disk: a site's disk by its name.
        federation: settings of the network, at a rank that no model exceeds.
        split: `test` or `validation`.
        tolerance: mm of the normalised surface Dice.
        pictures: draws some cases.
        told: told of every case that is scored, by `model at site`.

    Raises:
        DataError: if a scan cannot be used.
        UpdateError: if an adapter does not fit.
    """
    scores: Scores = {model.name: {} for model in models}
    drawn: list[Picture] = []
    for name in sites:
        work = build_work(federation, disk(name))
        for index, model in enumerate(models):
            model.put_on(work)
            watch = _watch(f"{model.name} at {name}", pictures if index == 0 else None, told)
            scores[model.name][name] = work.evaluate(
                split, surface_tolerance=tolerance, on_case=watch
            )
        drawn += pictures.draw(work, split, models[0].name)
    return scores, drawn


def _watch(what: str, pictures: Pictures | None, told: Callable[[str], None]) -> OnCase:
    def on_case(volume: Prepared, mask: Tensor, found: CaseScore) -> None:
        if pictures is not None:
            pictures.look(volume, mask, found)
        told(what)

    return on_case
