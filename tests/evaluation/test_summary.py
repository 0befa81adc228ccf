"""Means, worst site, intervals and gains, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from flap_nvflare.evaluation.summary import Bootstrap, Figure, collaborative_gain, summarise
from flap_nvflare.training.scores import CaseScore, SiteScore

NAMES = ("kidney", "tumour")
FEW = Bootstrap(samples=200)


def site(name: str, *dice: tuple[float | None, float | None], **figures: list) -> SiteScore:
    cases = []
    for index, pair in enumerate(dice):
        paper = tuple(1.0 if figure is None else figure for figure in pair)
        more = {key: tuple(values[index]) for key, values in figures.items()}
        cases.append(CaseScore(f"{name}{index}", pair, paper, **more))
    return SiteScore(name, "test", NAMES, tuple(cases))


def test_a_mean_is_over_cases_then_over_sites_and_the_worst_site_is_named() -> None:
    scores = {
        "A": site("A", (0.8, None), (0.6, 0.2), (0.4, 0.4)),
        "B": site("B", (0.9, None)),  # one case weighs as much as A's three
    }
    dice = summarise(scores, FEW)["dice"]
    assert dice["kidney"].mean == pytest.approx((0.6 + 0.9) / 2)
    assert (dice["kidney"].worst_site, dice["kidney"].worst) == ("A", pytest.approx(0.6))
    # B says nothing of tumours, so A alone does.
    assert dice["tumour"].mean == pytest.approx(0.3)
    assert (dice["kidney"].left_out, dice["tumour"].left_out) == (0, 2)
    # Of a site the mean of its classes: A (0.6 + 0.3) / 2, B 0.9.
    assert dice["mean"].mean == pytest.approx((0.45 + 0.9) / 2)
    assert dice["mean"].left_out == 2
    assert dice["mean"].mean == pytest.approx(
        sum(score.dice for score in scores.values() if score.dice is not None) / 2
    )


def test_both_masks_empty_count_as_one_for_the_paper() -> None:
    paper = summarise({"A": site("A", (0.8, None), (0.6, 0.2))}, FEW)["dice_paper"]
    assert paper["tumour"].mean == pytest.approx(0.6)
    assert paper["tumour"].left_out == 0


def test_of_a_distance_the_largest_is_the_worst() -> None:
    scores = {
        "A": site("A", (0.5, 0.5), hd95=[(4.0, None)]),
        "B": site("B", (0.5, 0.5), hd95=[(9.0, 3.0)]),
    }
    found = summarise(scores, FEW)["hd95"]
    assert (found["kidney"].worst_site, found["kidney"].worst) == ("B", 9.0)
    assert found["tumour"].left_out == 1


def test_figures_that_were_not_asked_for_are_not_there() -> None:
    assert summarise({"A": site("A", (0.5, 0.5))}, FEW).keys() == {"dice", "dice_paper"}


def test_the_interval_is_scipys_percentile_interval() -> None:
    draw = np.random.default_rng(7)
    values = [draw.uniform(0.2, 0.9, size) for size in (5, 8, 12)]
    scores = {
        name: site(name, *((float(value), None) for value in one))
        for name, one in zip("ABC", values, strict=True)
    }
    found = summarise(scores, Bootstrap(samples=20_000))["dice"]["kidney"]
    wanted = stats.bootstrap(
        values,
        lambda *samples, axis: sum(sample.mean(axis=axis) for sample in samples) / 3,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low, found.high) == (
        pytest.approx(wanted.low, abs=0.003),
        pytest.approx(wanted.high, abs=0.003),
    )


def test_an_interval_of_two_cases_runs_from_one_to_the_other() -> None:
    # Resamples are (a, a), (a, b), (b, a), (b, b): a quarter of them lie at either end.
    found = summarise({"A": site("A", (0.2, None), (0.6, None))}, FEW)["dice"]["kidney"]
    assert (found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.6))


def test_the_same_seed_gives_the_same_interval_and_single_cases_give_none() -> None:
    scores = {"A": site("A", (0.2, 0.1), (0.6, 0.3), (0.7, 0.2))}
    assert summarise(scores, FEW) == summarise(scores, FEW)
    other = summarise(scores, Bootstrap(samples=200, seed=1, level=0.5))
    assert other["dice"]["mean"] != summarise(scores, FEW)["dice"]["mean"]
    single = summarise({"A": site("A", (0.2, 0.1)), "B": site("B", (0.6, 0.3))}, FEW)
    assert single["dice"]["kidney"] == Figure(pytest.approx(0.4), None, None, "A", 0.2, 0)


def test_nothing_known_is_none() -> None:
    found = summarise({"A": site("A", (None, None), (None, None))}, FEW)["dice"]
    assert found["mean"] == Figure(None, None, None, None, None, 4)


@pytest.mark.parametrize("values", [{"samples": 0}, {"level": 1.0}])
def test_a_bootstrap_without_sense_is_refused(values: dict) -> None:
    with pytest.raises(ValueError, match="samples must be above 0"):
        Bootstrap(**values)


def test_the_gain_is_of_the_mean_dice_at_the_sites_own_cases() -> None:
    together = {"A": site("A", (0.8, 0.4)), "B": site("B", (0.6, 0.2)), "C": site("C", (0.5, 0.5))}
    alone = {"A": site("A", (0.6, 0.2)), "B": site("B", (None, None)), "C": site("C", (0.7, 0.5))}
    gain = collaborative_gain(together, alone)
    assert gain["sites"] == {"A": pytest.approx(0.2), "B": None, "C": pytest.approx(-0.1)}
    assert gain["mean"] == pytest.approx(0.05)
