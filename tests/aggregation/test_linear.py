"""Rules under which one matrix of an adapter travels alone: ffa, alternate, core, share_a."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from aggregation_cases import equal_bits, random_sites
from hypothesis import given, settings
from hypothesis import strategies as st

from flap_nvflare.aggregation import (
    RULES,
    AggregationError,
    Contribution,
    Round,
    accumulator,
    aggregate,
    card,
)
from flap_nvflare.aggregation.linear import travelling

A, B, CORE = ".lora_a", ".lora_b", ".lora_core"
# Rule, round, what travels then.
CASES = [
    ("ffa", 0, B),
    ("ffa", 1, B),
    ("alternate", 0, B),
    ("alternate", 1, A),
    ("alternate", 8, B),
    ("core", 0, CORE),
    ("share_a", 1, A),
]
cases = pytest.mark.parametrize(("rule", "index", "ending"), CASES)


def lone(name: str, weight: float, ending: str, matrix: list, head: list) -> Contribution:
    return Contribution(
        name, weight, {"q" + ending: torch.tensor(matrix), "head": torch.tensor(head)}
    )


def lone_sites(count: int, ending: str, seed: int = 0) -> list[Contribution]:
    """Updates that hold one matrix of each of two adapters, (4, 6) and (7, 3) of rank 2, a head."""
    found = []
    for one in random_sites(count, [(4, 6, 2), (7, 3, 2)], seed=seed):
        tensors = {}
        for name, tensor in one.tensors.items():
            if name == "head" or name.endswith(ending):
                tensors[name] = tensor
            elif ending == CORE and name.endswith(A):
                tensors[name.removesuffix(A) + CORE] = tensor[:, :2].contiguous()
        found.append(Contribution(one.site, one.weight, tensors))
    return found


@cases
def test_two_sites_by_hand(rule: str, index: int, ending: str) -> None:
    one = lone("a", 1, ending, [[4.0, 0.0], [0.0, -4.0]], [1.0])
    other = lone("b", 3, ending, [[0.0, 8.0], [4.0, 4.0]], [5.0])
    result = aggregate(rule, [one, other], Round(index=index))
    assert list(result.tensors) == ["head", "q" + ending]
    assert result.tensors["q" + ending].tolist() == [[1.0, 6.0], [3.0, 2.0]]
    assert result.tensors["head"].tolist() == [4.0]
    assert (result.error, result.turned, result.offset, result.excluded) == (0.0, False, {}, ())


@pytest.mark.parametrize(("rule", "index"), [("ffa", 0), ("alternate", 0), ("alternate", 1)])
def test_the_product_of_the_mean_is_the_mean_product(rule: str, index: int) -> None:
    ending = travelling(card(rule), index)
    sites = lone_sites(5, ending)
    result = aggregate(rule, sites, Round(index=index))
    name, fixed = "l0" + ending, torch.randn(2, 6) if ending == B else torch.randn(4, 2)
    total = sum(one.weight for one in sites)

    def product(matrix: torch.Tensor) -> torch.Tensor:
        return matrix @ fixed if ending == B else fixed @ matrix

    exact = sum(one.weight / total * product(one.tensors[name]) for one in sites)
    torch.testing.assert_close(product(result.tensors[name]), exact, rtol=1e-5, atol=1e-6)


def test_the_core_between_frozen_factors_is_exact() -> None:
    sites = lone_sites(5, CORE)
    b, a, total = torch.randn(9, 2), torch.randn(2, 8), sum(one.weight for one in sites)
    exact = sum(one.weight / total * (b @ one.tensors["l0.lora_core"] @ a) for one in sites)
    found = b @ aggregate("core", sites).tensors["l0.lora_core"] @ a
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@cases
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_bits(
    rule: str, index: int, ending: str, count: int, seed: int, random: Any
) -> None:
    sites = lone_sites(count, ending, seed)
    first = aggregate(rule, sites, Round(index=index))
    random.shuffle(sites)
    assert equal_bits(first, aggregate(rule, sites, Round(index=index)))


@cases
def test_another_matrix_of_an_adapter_is_refused_and_leaves_no_trace(
    rule: str, index: int, ending: str
) -> None:
    sites = lone_sites(2, ending)
    updates = accumulator(rule, Round(index=index))
    updates.add(sites[0])
    for foreign in {A, B, CORE} - {ending}:
        bad = {**sites[1].tensors, "l0" + foreign: torch.zeros(2, 2)}
        text = f"'l0{foreign}' of site 'site-1' does not travel in round {index}.*'{ending}' alone"
        with pytest.raises(AggregationError, match=text) as got:
            updates.add(Contribution("site-1", 1.0, bad))
        assert got.value.key == "l0" + foreign
    updates.add(sites[1])
    assert equal_bits(updates.result(), aggregate(rule, sites, Round(index=index)))


@cases
def test_what_holds_for_every_rule_is_checked_here_too(rule: str, index: int, ending: str) -> None:
    known = Round(index=index)
    one, other = lone_sites(2, ending)
    with pytest.raises(AggregationError, match="at least one site"):
        aggregate(rule, [], known)
    with pytest.raises(AggregationError, match="twice"):
        aggregate(rule, [one, one], known)
    for text, tensors in [
        ("'head' is missing at site 'site-1'", {"l0" + ending: other.tensors["l0" + ending]}),
        (
            "'head' of site 'site-1' holds nan",
            {**other.tensors, "head": torch.full((5,), math.nan)},
        ),
        (r"\(9, 9\) at site 'site-1'", {**other.tensors, "l0" + ending: torch.zeros(9, 9)}),
    ]:
        with pytest.raises(AggregationError, match=text):
            aggregate(rule, [one, Contribution("site-1", 1.0, tensors)], known)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_are_dense_in_the_dtype_of_the_updates(dtype: torch.dtype) -> None:
    sites = [
        Contribution(one.site, one.weight, {n: x.to(dtype) for n, x in one.tensors.items()})
        for one in lone_sites(3, B)
    ]
    for name, tensor in aggregate("ffa", sites).tensors.items():
        assert (tensor.dtype, tensor.shape) == (dtype, sites[0].tensors[name].shape)
        assert tensor.is_contiguous()


def test_cards_say_what_travels() -> None:
    for rule, trains, private in [
        ("ffa", "b", ""),
        ("alternate", "alternate", ""),
        ("core", "core", ""),
        ("share_a", "ab", "b"),
    ]:
        found = RULES[rule].CARD
        assert (found.trains, found.private, found.linear, found.pairs) == (
            trains,
            private,
            True,
            False,
        )
