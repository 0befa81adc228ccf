"""What the test cases say: the matrix of models and sites, the evaluation, the headline's Dice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flap_nvflare.report.read import Run
from flap_nvflare.report.values import count, mapping, mean, number, rows, share, shown, texts

# Which of the models is the run's result, the first that is there.
_RESULTS = ("federated", "best", "last")
_BASELINES = ("local", "pooled", "left_out")
_OWN = "site_"  # before the site's name: its own adapter in cross_site.json


@dataclass(frozen=True)
class Spread:
    """A figure with its interval.

    Attributes:
        mean: over the cases, then over the sites.
        low, high: the interval's ends; None where none was worked out.
        worst: the lowest of the sites (of distances the highest).
        worst_site: whose.
        left_out: cases that say nothing of it.
    """

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    worst: float | None = None
    worst_site: str = ""
    left_out: int = 0


@dataclass(frozen=True)
class Model:
    """An evaluated model.

    Attributes:
        name: its name.
        kind: `federated`, `local`, `pooled`, `left_out`, `adapter` or another.
        trained_on: names of the sites whose data it saw.
        summary: by figure (`dice`, `nsd`, `hd95`, ...) and class or `mean`.
    """

    name: str
    kind: str
    trained_on: tuple[str, ...]
    summary: dict[str, dict[str, Spread]]

    def spread(self, figure: str = "dice", name: str = "mean") -> Spread:
        """The figure of a class, or of all; empty if it was not worked out."""
        return self.summary.get(figure, {}).get(name, Spread())


@dataclass(frozen=True)
class SiteRow:
    """Scores of one model on one site's test cases: by figure and class or `mean`."""

    site: str
    cases: int
    seen: bool | None
    figures: dict[str, dict[str, float | None]]


def matrix(run: Run) -> dict[str, dict[str, float | None]]:
    """Mean Dice by model and site: best, last, each site's own, then an evaluation's baselines."""
    evaluated = {
        name: mapping(mapping(model).get("sites"))
        for name, model in mapping(run.evaluation.get("models")).items()
    }
    cross = run.cross_site or evaluated
    order = {name: place for place, name in enumerate(_RESULTS)}
    sites = {_OWN + site: place for place, site in enumerate(run.sites, start=len(order))}
    names = sorted(cross, key=lambda name: (order.get(name, sites.get(name, 10**9)), name))
    found = {name: cross[name] for name in names}
    if run.split == "test":
        baselines = (one.name for one in models(run) if one.kind in _BASELINES)
        found |= {name: evaluated[name] for name in baselines}
    return {
        name: {site: _mean_dice(score) for site, score in by_site.items()}
        for name, by_site in found.items()
    }


def home_of(run: Run) -> dict[str, str]:
    """By model the one site whose own it is, where it is one's."""
    homes = {_OWN + site: site for site in run.sites}
    for model in models(run):
        if model.kind == "local" and len(model.trained_on) == 1:
            homes[model.name] = model.trained_on[0]
    return homes


def model_label(name: str) -> str:
    """A model of the matrix in words."""
    return f"{name.removeprefix(_OWN)}'s own" if name.startswith(_OWN) else name


def models(run: Run) -> list[Model]:
    """The evaluated models in the file's order; empty without an evaluation."""
    return [
        Model(
            name=name,
            kind=str(mapping(model).get("kind", "")),
            trained_on=tuple(texts(mapping(model).get("trained_on"))),
            summary=_summary(mapping(model)),
        )
        for name, model in mapping(run.evaluation.get("models")).items()
    ]


def side_by_side(run: Run) -> list[tuple[str, str, Spread]]:
    """Name, note and test Dice of the models that a reader compares first.

    The federation's, the sites alone each at home, pooled data, federations without a site; the
    single sites' models stand in the tables, and here only if there is nothing else to compare.
    """
    all_of_them = models(run)
    first = [one for one in all_of_them if one.kind != "local" and not one.name.startswith(_OWN)]
    found = [(one.name, trained_on(one), one.spread()) for one in first]
    if home := _summary(mapping(run.evaluation.get("local_only"))):
        spread = home.get("dice", {}).get("mean", Spread())
        found.insert(1, ("local only", "each site alone, at home", spread))
    if len(found) < 2:
        return [(model_label(one.name), trained_on(one), one.spread()) for one in all_of_them]
    return found


def trained_on(model: Model) -> str:
    """Whose data a model saw."""
    if not model.trained_on:
        return ""
    if len(model.trained_on) > 6:
        return f"trained on {len(model.trained_on)} sites"
    return "trained on " + ", ".join(shown(site) for site in model.trained_on)


def unseen(run: Run) -> list[tuple[str, str, float | None, float | None]]:
    """Of sites that a federation was trained without: site, model, its Dice there, the result's."""
    ours = mapping(
        mapping(mapping(run.evaluation.get("models")).get(result_model(run))).get("sites")
    )
    found = []
    for name, model in mapping(run.evaluation.get("models")).items():
        for site, score in mapping(mapping(model).get("sites")).items():
            if mapping(model).get("kind") == "left_out" and mapping(score).get("seen") is False:
                found.append((site, name, _mean_dice(score), _mean_dice(ours.get(site))))
    return found


def _mean_dice(score: Any) -> float | None:
    return share(mapping(mapping(score).get("dice")).get("mean"))


def result_model(run: Run) -> str:
    """Name of the model that is the run's result; empty if none was scored."""
    evaluated = models(run)
    names = [model.name for model in evaluated] or list(run.cross_site)
    federated = [model.name for model in evaluated if model.kind == "federated"]
    for name in (*_RESULTS, *federated, *names):
        if name in names:
            return name
    return ""


def result_dice(run: Run) -> tuple[str, Spread]:
    """The headline: the result's name, and its mean test Dice with the worst site."""
    name = result_model(run)
    for model in models(run):
        if model.name == name:
            return name, model.spread()
    scores = {site: _mean_dice(score) for site, score in run.cross_site.get(name, {}).items()}
    known = {site: score for site, score in scores.items() if score is not None}
    if not known:
        return name, Spread()
    worst = min(known, key=lambda site: (known[site], site))
    return name, Spread(mean=mean(known.values()), worst=known[worst], worst_site=worst)


def site_rows(run: Run) -> list[SiteRow]:
    """The result's scores on each site's test cases."""
    name = result_model(run)
    evaluated = mapping(mapping(run.evaluation.get("models")).get(name))
    scores = mapping(evaluated.get("sites")) or run.cross_site.get(name, {})
    return [
        SiteRow(
            site=site,
            cases=len(rows(mapping(score).get("cases"))),
            seen=score.get("seen") if isinstance(score.get("seen"), bool) else None,
            figures={
                figure: {key: number(one) for key, one in mapping(score.get(figure)).items()}
                for figure in ("dice", "nsd", "hd95")
            },
        )
        for site, score in ((site, mapping(score)) for site, score in scores.items())
    ]


def gain(run: Run) -> dict[str, Any]:
    """The collaborative gain as the evaluation gives it; empty without one."""
    return mapping(run.evaluation.get("collaborative_gain"))


def _summary(values: dict[str, Any]) -> dict[str, dict[str, Spread]]:
    return {
        figure: {key: _spread(mapping(one)) for key, one in mapping(by_class).items()}
        for figure, by_class in mapping(values.get("summary")).items()
    }


def _spread(values: dict[str, Any]) -> Spread:
    return Spread(
        mean=number(values.get("mean")),
        low=number(values.get("low")),
        high=number(values.get("high")),
        worst=number(values.get("worst")),
        worst_site=str(values.get("worst_site") or ""),
        left_out=count(values.get("left_out")),
    )
