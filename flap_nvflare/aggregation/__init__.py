"""How many updates become one: one rule a file; updates are folded in as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from flap_nvflare.aggregation.mean import Mean
from flap_nvflare.aggregation.rule import (
    Accumulator,
    Aggregate,
    AggregationError,
    Contribution,
    Rule,
    fold,
)
from flap_nvflare.aggregation.svd import Svd

RULES: Mapping[str, Rule] = MappingProxyType({"mean": Mean, "svd": Svd})


def accumulator(rule_name: str) -> Accumulator:
    """A fresh accumulator of the named rule.

    Raises:
        AggregationError: if the rule is unknown.
    """
    if rule_name not in RULES:
        raise AggregationError(f"rule {rule_name!r} is not known; expected one of {tuple(RULES)}")
    return RULES[rule_name]()


def aggregate(rule_name: str, contributions: Iterable[Contribution]) -> Aggregate:
    """One update from many by the named rule, the same in whatever order they are given.

    Raises:
        AggregationError: if the rule is unknown, there is no contribution, or they do not
            fit together.
    """
    return fold(accumulator(rule_name), contributions)


__all__ = [
    "RULES",
    "Accumulator",
    "Aggregate",
    "AggregationError",
    "Contribution",
    "Rule",
    "accumulator",
    "aggregate",
    "fold",
]
