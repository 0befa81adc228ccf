"""How many updates become one: one rule a file, all of them pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from flap_nvflare.aggregation import mean, svd
from flap_nvflare.aggregation.rule import Aggregate, AggregationError, Contribution, Rule

RULES: Mapping[str, Rule] = MappingProxyType({"mean": mean.mean, "svd": svd.svd})


def aggregate(rule_name: str, contributions: Sequence[Contribution]) -> Aggregate:
    """One update from many by the named rule, the same in whatever order they are given.

    Raises:
        AggregationError: if the rule is unknown, there is no contribution, or they do not
            fit together.
    """
    if rule_name not in RULES:
        raise AggregationError(f"rule {rule_name!r} is not known; expected one of {tuple(RULES)}")
    return RULES[rule_name](contributions)


__all__ = ["RULES", "Aggregate", "AggregationError", "Contribution", "Rule", "aggregate"]
