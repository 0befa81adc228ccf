"""What a site says of itself, read by a server that trusts nobody: figures, and nothing else.

A report comes with every update, scores come at the end. Both are cut down to the fields that
the server knows; a false type or a figure out of range makes the message unreadable.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from flap_nvflare.adapter.privacy import UNIT
from flap_nvflare.flare.privacy import read_statement
from flap_nvflare.training.scores import SiteScore

_NUMBERS = ("loss", "steps", "slices", "cases", "seconds")
_FIELDS = {*_NUMBERS, "synthetic", "privacy", "timings", "dice"}
# What a site's seconds are spent on: building and loading the network, scoring what came, reading
# the scans, optimiser steps, writing its state.
TIMINGS = ("open", "evaluate", "read", "steps", "save")
# Cases that a site may score: what it says of each is kept.
_MOST_CASES = 10_000


def read_report(value: Any, class_names: tuple[str, ...]) -> dict[str, Any]:
    """A site's figures of a round: `_NUMBERS`, `TIMINGS`, `synthetic`, `privacy`, Dice by class.

    Raises:
        ValueError: if a field is there and is not what its name says.
    """
    if not isinstance(value, Mapping):
        raise ValueError("the report is no mapping")
    report: dict[str, Any] = {}
    for name in _NUMBERS:
        if name in value:
            report[name] = _number(value[name], name)
    if "synthetic" in value:
        if type(value["synthetic"]) is not bool:
            raise ValueError("synthetic: no truth value")
        report["synthetic"] = value["synthetic"]
    if "privacy" in value:
        report["privacy"] = read_statement(value["privacy"])
    timings = value.get("timings", {})
    if not isinstance(timings, Mapping) or not set(timings) <= set(TIMINGS):
        raise ValueError(f"timings: no seconds of {TIMINGS}")
    report["timings"] = {name: _number(seconds, name) for name, seconds in timings.items()}
    dice = value.get("dice", {})
    if not isinstance(dice, Mapping):
        raise ValueError("dice: no mapping")
    if not set(dice) <= {*class_names, "mean"}:
        raise ValueError(f"dice: of other classes than {class_names}")
    report["dice"] = {name: _share(figure) for name, figure in dice.items()}
    return report


def check_report_fields(value: Any) -> None:
    """Whether a report has no field, and no text, that the server would not read.

    For the site's own gate, before it leaves.

    Raises:
        ValueError: naming what is too much.
    """
    if type(value) is not dict or not set(value) <= _FIELDS:
        raise ValueError(f"a report has no other fields than {sorted(_FIELDS)}")
    privacy = value.get("privacy", {})
    if type(privacy) is not dict or privacy.get("unit", UNIT) != UNIT:
        raise ValueError("privacy: another unit than the data of one site")


def read_scores(
    value: Any, site: str, models: Collection[str], class_names: tuple[str, ...]
) -> dict[str, Any]:
    """A site's scores of the models: by model and split, as `SiteScore.to_dict` gives them.

    Summaries are worked out anew from the cases.

    Raises:
        ValueError: if a model or its test cases are missing, or a figure is none.
    """
    scores: dict[str, Any] = {}
    for model in models:
        try:
            found = {
                split: SiteScore.from_dict(value[model][split])
                for split in ("test", "validation")
                if split == "test" or split in value[model]
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"scores of model {model!r}: {type(error).__name__}") from error
        for score in found.values():
            _check(score, class_names)
        scores[model] = {
            split: _own(score, site, split).to_dict() for split, score in found.items()
        }
    return scores


def _own(score: SiteScore, site: str, split: str) -> SiteScore:
    """With the server's own words for site and split, and without figures that it did not ask."""
    cases = tuple(replace(case, nsd=(), hd95=(), dice_flamby=()) for case in score.numbered().cases)
    return replace(score, site=site, split=split, cases=cases)


def _check(score: SiteScore, class_names: tuple[str, ...]) -> None:
    if score.class_names != class_names or not math.isfinite(score.seconds):
        raise ValueError(f"scores of other classes than {class_names}")
    if len(score.cases) > _MOST_CASES:
        raise ValueError(f"scores of {len(score.cases)} cases, at most {_MOST_CASES}")
    for case in score.cases:
        for figures in (case.dice, case.dice_paper):
            if len(figures) != len(class_names):
                raise ValueError(f"{len(figures)} figures of a case, expected {len(class_names)}")
            for figure in figures:
                _share(figure)


def _number(value: Any, name: str) -> int | float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name}: no finite number")
    number: int | float = value
    return number


def _share(value: Any) -> float | None:
    if value is not None and not 0 <= _number(value, "dice") <= 1:
        raise ValueError("dice: out of 0 to 1")
    return None if value is None else float(value)
