"""How many updates become one: one rule a file; updates are folded in as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from types import MappingProxyType

from flap_nvflare.aggregation.rule import (
    FIRST_ROUND,
    Accumulator,
    Aggregate,
    AggregationError,
    Card,
    Contribution,
    Round,
    Rule,
    fold,
)

# Every rule: its name, which is its file's, and its class there.
_CLASSES = {
    "alternate": "Alternate",
    "core": "Core",
    "fair": "Fair",
    "ffa": "Ffa",
    "krum": "Krum",
    "mean": "Mean",
    "median": "Median",
    "ranked": "Ranked",
    "residual": "Residual",
    "share_a": "ShareA",
    "stack": "Stack",
    "svd": "Svd",
    "tail": "Tail",
}
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        name: getattr(import_module(f"flap_nvflare.aggregation.{name}"), class_name)
        for name, class_name in _CLASSES.items()
    }
)


def card(rule_name: str) -> Card:
    """What the named rule is.

    Raises:
        AggregationError: if the rule is unknown.
    """
    return _named(rule_name).CARD


def least_sites(rule_name: str, hostile: int) -> int:
    """Updates that the named rule must have in a round, with so many of them hostile.

    Raises:
        AggregationError: if the rule is unknown.
    """
    return _named(rule_name).least(hostile)


def accumulator(rule_name: str, round: Round = FIRST_ROUND) -> Accumulator:
    """A fresh accumulator of the named rule for one round.

    Raises:
        AggregationError: if the rule is unknown.
    """
    return _named(rule_name)(round)


def aggregate(
    rule_name: str, contributions: Iterable[Contribution], round: Round = FIRST_ROUND
) -> Aggregate:
    """One update from many by the named rule, the same in whatever order they are given.

    Raises:
        AggregationError: if the rule is unknown, there is no contribution, or they do not
            fit together.
    """
    return fold(accumulator(rule_name, round), contributions)


def _named(rule_name: str) -> Rule:
    if rule_name not in RULES:
        raise AggregationError(f"rule {rule_name!r} is not known; expected one of {tuple(RULES)}")
    return RULES[rule_name]


__all__ = [
    "RULES",
    "Accumulator",
    "Aggregate",
    "AggregationError",
    "Card",
    "Contribution",
    "Round",
    "Rule",
    "accumulator",
    "aggregate",
    "card",
    "fold",
    "least_sites",
]
