from __future__ import annotations

import math

import pytest

from flap_nvflare.aggregation import RULES, aggregate
from flap_nvflare.bench.many_sites import VIT_B, measure_many, measure_sites, updates

_SMALL = {"q.lora_a": (4, 16), "q.lora_b": (24, 4), "head": (7,)}


def test_the_size_is_that_of_the_method_on_vit_b() -> None:
    assert sum(math.prod(shape) for shape in VIT_B.values()) == 1_846_384


@pytest.mark.parametrize("sites", [1, 5])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_figures_are_of_the_rule_and_its_updates(rule: str, sites: int) -> None:
    figures = measure_sites(rule, sites, _SMALL)
    assert (figures.rule, figures.sites) == (rule, sites)
    assert figures.error == aggregate(rule, updates(_SMALL, sites)).error
    assert 0 < figures.fold_seconds <= figures.slowest_fold_seconds
    assert figures.result_seconds > 0


def test_memory_counts_what_a_rule_holds() -> None:
    # Two sites' products of 1000 x 1000 are dense: two float64 levels of 8 MB.
    (figures,) = measure_many((2,), ("svd",), {"q.lora_a": (400, 1000), "q.lora_b": (1000, 400)})
    assert figures.peak_bytes > 16e6


@pytest.mark.slow
def test_each_rule_and_count_is_measured_in_turn() -> None:
    found = measure_many((1, 2), ("mean",), _SMALL)
    assert [(one.rule, one.sites) for one in found] == [("mean", 1), ("mean", 2)]
