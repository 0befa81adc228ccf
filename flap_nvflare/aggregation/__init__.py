"""Rules that make one update of many: one file a rule, pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from flap_nvflare.aggregation.mean import mean
from flap_nvflare.aggregation.rule import Aggregate, Contribution, Rule
from flap_nvflare.aggregation.svd import svd

RULES: dict[str, Rule] = {"mean": mean, "svd": svd}


def aggregate(rule: str, contributions: Sequence[Contribution]) -> Aggregate:
    """Applies the rule of that name.

    Raises:
        ValueError: on an unknown rule, or on updates that the rule can't take.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not known; expected one of {tuple(RULES)}")
    return RULES[rule](contributions)
