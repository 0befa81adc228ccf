"""From the scores of sites to the figures of a model: means, worst site, intervals, gain.

A figure is the mean over a site's cases, then over the sites, so that a large site counts no more
than a small one. Cases that say nothing of a class are left out and counted, as `training.scores`
states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flap_nvflare.training.scores import FIGURES, SiteScore

MEAN = "mean"  # of the classes
LOWER_IS_BETTER = ("hd95",)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: percentiles over resamples of the cases within each site.

    Not scipy.stats.bootstrap, which refuses a site with one case.

    Attributes:
        samples: resamples.
        seed: of the resamples, which are the same for every model and figure.
        level: share of them within the interval.
    """

    samples: int = 2000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 < self.level < 1:
            raise ValueError(f"{self}: samples must be above 0, and level between 0 and 1")


@dataclass(frozen=True)
class Figure:
    """One figure of one class, or of the mean of the classes.

    Attributes:
        mean: mean over cases, then over sites; None if no case has the figure.
        low, high: bounds of the bootstrap's interval; None if no site has two cases.
        worst_site, worst: the site whose mean is the worst, and that mean.
        left_out: cases that have no such figure; for the mean of the classes cases and classes.
    """

    mean: float | None
    low: float | None
    high: float | None
    worst_site: str | None
    worst: float | None
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds."""
        return asdict(self)


def summarise(
    scores: Mapping[str, SiteScore], bootstrap: Bootstrap
) -> dict[str, dict[str, Figure]]:
    """By figure and class (and `mean` of the classes) what the sites' scores come to.

    Args:
        scores: one model's scores by site, all of the same classes; at least one.
        bootstrap: how the intervals are made.
    """
    return {
        name: _by_class(scores, name, bootstrap)
        for name in FIGURES
        if any(getattr(case, name) for score in scores.values() for case in score.cases)
    }


def _by_class(
    scores: Mapping[str, SiteScore], name: str, bootstrap: Bootstrap
) -> dict[str, Figure]:
    columns = (*next(iter(scores.values())).class_names, MEAN)
    tables = {site: _table(score, name) for site, score in sorted(scores.items())}
    means = {site: site_means(table) for site, table in tables.items()}
    middle = _mean(np.stack(list(means.values())), axis=0)
    low, high = _interval(list(tables.values()), bootstrap)
    left_out = sum(np.isnan(table).sum(axis=0) for table in tables.values())
    counts = [*(int(count) for count in left_out), int(np.sum(left_out))]
    sign = -1 if name in LOWER_IS_BETTER else 1
    figures = {}
    for index, column in enumerate(columns):
        known = {site: mean[index] for site, mean in means.items() if not np.isnan(mean[index])}
        worst = min(known, key=lambda site: sign * known[site], default=None)
        figures[column] = Figure(
            mean=_plain(middle[index]),
            low=_plain(low[index]),
            high=_plain(high[index]),
            worst_site=worst,
            worst=None if worst is None else float(known[worst]),
            left_out=counts[index],
        )
    return figures


def _table(score: SiteScore, name: str) -> np.ndarray:
    """(cases, classes) float64, nan where a case has no such figure."""
    rows = [getattr(case, name) for case in score.cases if getattr(case, name)]
    return np.array(rows, dtype=float).reshape(len(rows), len(score.class_names))


def site_means(table: np.ndarray) -> np.ndarray:
    """(..., classes + 1): the mean over the cases of each class, then the mean of those.

    Args:
        table: (..., cases, classes), nan where a case has no figure.
    """
    classes = _mean(table, axis=-2)
    return np.concatenate([classes, _mean(classes, axis=-1)[..., None]], axis=-1)


def _interval(tables: list[np.ndarray], bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """The bounds (classes + 1) each; nan where there is nothing to resample."""
    draws = np.random.default_rng(bootstrap.seed)
    resampled = []
    for table in tables:
        cases = len(table)
        chosen = draws.integers(max(cases, 1), size=(bootstrap.samples, cases))
        resampled.append(site_means(table[chosen]))
    over_sites = _mean(np.stack(resampled), axis=0)
    if all(len(table) < 2 for table in tables):
        over_sites = np.full_like(over_sites, np.nan)
    tail = (1 - bootstrap.level) / 2
    bounds = np.full((2, over_sites.shape[1]), np.nan)
    for index, values in enumerate(over_sites.T):
        known = values[~np.isnan(values)]
        if len(known):
            bounds[:, index] = np.quantile(known, [tail, 1 - tail])
    return bounds[0], bounds[1]


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is known; nan, without numpy's warning, where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    mean: np.ndarray = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return mean


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def collaborative_gain(
    together: Mapping[str, SiteScore], alone: Mapping[str, SiteScore]
) -> dict[str, Any]:
    """What a site gains from the federation (arXiv 2407.21739): its Dice less that of its own.

    Of the mean Dice of the classes, on the site's own cases.

    Args:
        together: the federation's adapter at every site.
        alone: by site the score there of what the site has trained alone.

    Returns:
        `sites` by name, None where a Dice is missing, and their `mean`.
    """
    sites = {}
    for site, score in sorted(alone.items()):
        ours, own = together[site].dice, score.dice
        sites[site] = None if ours is None or own is None else ours - own
    known = [gain for gain in sites.values() if gain is not None]
    return {"sites": sites, "mean": sum(known) / len(known) if known else None}
