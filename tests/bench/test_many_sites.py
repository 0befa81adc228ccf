from __future__ import annotations

import math

import pytest
import torch

from flap_nvflare.aggregation import RULES, Card, aggregate, card
from flap_nvflare.bench import many_sites
from flap_nvflare.bench.many_sites import (
    VIT_B,
    SiteFigures,
    measure_many,
    measure_sites,
    travelling,
    updates,
)
from flap_nvflare.bench.rows import GROUPS, Setting

_SMALL = {"q.lora_a": (4, 48), "q.lora_b": (40, 4), "head": (7,)}


def test_the_size_is_that_of_the_method_on_vit_b() -> None:
    assert sum(math.prod(shape) for shape in VIT_B.values()) == 1_846_384


@pytest.mark.parametrize(
    ("trains", "private", "expected"),
    [
        ("ab", "", {"q.lora_a": (4, 48), "q.lora_b": (40, 4)}),
        ("b", "", {"q.lora_b": (40, 4)}),
        ("alternate", "", {"q.lora_b": (40, 4)}),
        ("core", "", {"q.lora_core": (4, 4)}),
        ("ab", "b", {"q.lora_a": (4, 48)}),
    ],
)
def test_sites_send_what_the_rule_trains(trains: str, private: str, expected: dict) -> None:
    one = Card("paper", "formula", "exact", trains=trains, private=private)
    assert travelling(one, _SMALL) == {"head": (7,), **expected}


@pytest.mark.parametrize("sites", [5, 9], ids=["stacked", "dense"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_figures_are_of_the_rule_and_its_updates(rule: str, sites: int) -> None:
    figures = measure_sites(rule, sites, _SMALL)
    sent = travelling(card(rule), _SMALL)
    assert (figures.rule, figures.sites) == (rule, sites)
    assert figures.error == aggregate(rule, updates(sent, sites)).error
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


def test_the_command_measures_what_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(sites: tuple[int, ...], rules: tuple[str, ...]) -> list[SiteFigures]:
        return [SiteFigures(r, n, 1, 0.25, 0.5, 2.0, 3 * 2**20, 0.0) for r in rules for n in sites]

    monkeypatch.setattr(many_sites, "measure_many", measured)
    assert many_sites.main(["--sites", "6", "20", "--rules", "svd", "mean"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:] == [
        f"| {rule} | {sites} | 2.000 | 0.250 | 0.500 | 3 |"
        for rule in ("svd", "mean")
        for sites in (6, 20)
    ]
    assert many_sites.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 + 3 * len(RULES)


def test_the_bench_compares_100_sites_with_20(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(sites: tuple[int, ...], rules: tuple[str, ...]) -> list[SiteFigures]:
        return [
            SiteFigures(r, n, 1, 0.0, 0.0, n / 10, (n + 100) * 2**20, 0.0)
            for r in rules
            for n in sites
        ]

    monkeypatch.setattr(many_sites, "measure_many", measured)
    setting = Setting(torch.device("cpu"), bf16=False, repeats=1, batch=1, sizes=(48,))
    found = {row.name: (row.ours, row.reference) for row in GROUPS["aggregation"](setting)}
    assert found == {
        "aggregate_100_sites_seconds": (10.0, 2.0),
        "aggregate_100_sites_memory": (200.0, 120.0),
        "aggregate_100_sites_seconds_mean": (10.0, 2.0),
        "aggregate_100_sites_memory_mean": (200.0, 120.0),
    }
