"""Figures of sites: what is kept, and what makes a message unreadable."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from flap_nvflare.flare.reports import read_report, read_scores
from flap_nvflare.training.scores import CaseScore, SiteScore

CLASSES = ("kidney", "tumour")
REPORT = {
    "dice": {"kidney": 0.5, "tumour": None, "mean": 0.5},
    "loss": 0.3,
    "steps": 7,
    "slices": 50,
    "cases": 2,
    "seconds": 1.5,
    "synthetic": True,
    "timings": {"open": 0.1, "steps": 1.2},
}
PRIVACY = {
    "clip": 1.0,
    "noise": 0.5,
    "releases": 3,
    "delta": 1e-5,
    "epsilon_replace": 12.5,
    "epsilon_zero_out": None,
    "secret": True,
}
SCORE = SiteScore(
    "A", "test", CLASSES, (CaseScore("case_00004", (0.5, None), (0.5, 1.0)),), 2.0
).to_dict()
NUMBERED = SiteScore.from_dict(SCORE).numbered().to_dict()


def test_a_report_passes_without_what_the_server_does_not_know() -> None:
    assert read_report({**REPORT, "patient": "Jane"}, CLASSES) == REPORT
    assert read_report({}, CLASSES) == {"dice": {}, "timings": {}}
    private = {**REPORT, "privacy": PRIVACY}
    said = {**private, "privacy": {**PRIVACY, "unit": "all data of one site"}}
    assert read_report(said, CLASSES) == private


@pytest.mark.parametrize(
    "change",
    [
        {"dice": "high"},
        {"dice": {"mean": 1e9}},
        {"dice": {"mean": math.nan}},
        {"dice": {"mean": "0.9"}},
        {"dice": {"mean": True}},
        {"dice": {"liver": 0.5}},
        {"loss": math.inf},
        {"cases": [1]},
        {"synthetic": "no"},
        {"timings": {"lunch": 1.0}},
        {"timings": [1.0]},
        {"privacy": "perfect"},
        {"privacy": {}},
        {"privacy": {**PRIVACY, "secret": "yes"}},
        {"privacy": {**PRIVACY, "patient": "Jane"}},
    ],
)
def test_a_false_report_is_unreadable(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        read_report({**REPORT, **change}, CLASSES)


@pytest.mark.parametrize("name", sorted(set(PRIVACY) - {"secret"}))
@pytest.mark.parametrize("figure", [math.nan, math.inf, "none", True, [1.0]])
def test_a_false_figure_of_privacy_is_named(name: str, figure: Any) -> None:
    with pytest.raises(ValueError, match=f"privacy: {name} is no number"):
        read_report({"privacy": {**PRIVACY, name: figure}}, CLASSES)


def test_a_report_that_is_no_mapping_is_unreadable() -> None:
    with pytest.raises(ValueError, match="mapping"):
        read_report([1], CLASSES)


def test_scores_are_summed_up_anew() -> None:
    boasting = copy.deepcopy(SCORE)
    boasting["dice"]["mean"] = 1.0
    read = read_scores({"last": {"test": boasting}, "extra": 1}, "A", ["last"], CLASSES)
    boasting["cases"][0]["nsd"] = boasting["cases"][0]["dice_flamby"] = [math.nan]
    assert read == {"last": {"test": NUMBERED}}
    assert read == read_scores({"last": {"test": boasting}}, "A", ["last"], CLASSES)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"last": {}},
        {"last": {"test": "all well"}},
        {"last": {"test": {**SCORE, "class_names": ["kidney"]}}},
        {"last": {"test": {**SCORE, "cases": [{"case": "1", "dice": [2.0, 0.1]}]}}},
        {"last": {"test": {**SCORE, "cases": [{"case": "1", "dice": ["a", 0.1]}]}}},
        {"last": {"test": {**SCORE, "seconds": math.nan}}},
        {"last": {"test": SCORE, "validation": {}}},
    ],
)
def test_false_scores_are_unreadable(value: Any) -> None:
    with pytest.raises(ValueError, match=r"scores|figures|dice"):
        read_scores(value, "A", ["last"], CLASSES)


def test_no_name_of_a_case_leaves_a_site() -> None:
    score = SiteScore.from_dict(SCORE).numbered()
    assert [case.case for case in score.cases] == ["1"]
    assert score.by_class() == SiteScore.from_dict(SCORE).by_class()
