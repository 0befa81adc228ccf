"""Rules `residual` and `stack`: the mean product is kept whole, in the base."""

from __future__ import annotations

import math

import pytest
import torch
from aggregation_cases import (
    apart,
    exact_products,
    held,
    of_ranks,
    products,
    random_sites,
    site,
    unequal_federations,
    whole,
)
from hypothesis import assume, given, settings

from flap_nvflare.aggregation import AggregationError, Contribution, Round, aggregate, fold
from flap_nvflare.aggregation.mean import Mean
from flap_nvflare.aggregation.residual import Residual
from flap_nvflare.aggregation.stack import Stack

both = pytest.mark.parametrize("rule", ["residual", "stack"])
TWO = [site("a", 1, a=[[1.0, 0.0]], b=[[1.0]]), site("b", 1, a=[[3.0, 0.0]], b=[[3.0]])]


def dense(offset: dict[str, torch.Tensor], stem: str = "q") -> torch.Tensor:
    return offset[f"{stem}.offset_b"] @ offset[f"{stem}.offset_a"]


def test_the_residual_by_hand() -> None:
    # The mean of 1 * 1 and 3 * 3 is 5, the product of the means 2 * 2 = 4: one is missing.
    result = fold(Residual(), TWO)
    assert result.tensors["q.lora_a"].tolist() == [[2.0, 0.0]]
    assert result.tensors["q.lora_b"].tolist() == [[2.0]]
    torch.testing.assert_close(dense(result.offset), torch.tensor([[1.0, 0.0]]))
    assert result.offset["q.offset_a"].shape == (1, 2)
    assert result.error < 1e-12
    assert not result.turned
    # What was in the base stays there.
    old = {"q.offset_b": torch.tensor([[2.0]]), "q.offset_a": torch.tensor([[3.0, 4.0]])}
    later = fold(Residual(Round(index=1, offset=old)), TWO)
    torch.testing.assert_close(dense(later.offset), torch.tensor([[7.0, 8.0]]))


def test_the_stack_by_hand() -> None:
    old = {"q.offset_b": torch.tensor([[2.0]]), "q.offset_a": torch.tensor([[3.0, 4.0]])}
    result = fold(Stack(Round(offset=old)), TWO)
    torch.testing.assert_close(dense(result.offset), torch.tensor([[11.0, 8.0]]))
    assert result.tensors["q.lora_b"].tolist() == [[0.0]]
    assert result.error < 1e-12
    assert result.turned


@both
@settings(deadline=None, max_examples=60)
@given(unequal_federations())
def test_product_and_offset_are_the_mean_product(
    rule: str, contributions: list[Contribution]
) -> None:
    exact = exact_products(contributions)
    size = whole(exact)
    assume(size > 1e-2)
    round = Round()
    for index in range(3):
        result = aggregate(rule, contributions, round)
        beside = size * (1 + index)  # the base grows by the mean product every round
        assert apart(held(result, round.offset), exact) <= 1e-6 * beside
        assert result.error < 1e-6
        round = Round(index=index + 1, offset=result.offset)


@both
@pytest.mark.parametrize("sites", [3, 12], ids=["stacked", "dense"])
@pytest.mark.parametrize("tall", [False, True])
def test_the_offset_is_the_smallest_that_keeps_the_energy(
    rule: str, sites: int, tall: bool
) -> None:
    shape = (40, 32, 3) if tall else (32, 40, 3)
    contributions = random_sites(sites, [shape], drift=1.0)
    exact = exact_products(contributions)["l0"]
    result = aggregate(rule, contributions, Round(energy=0.9))
    wanted = exact - products(result.tensors)["l0"]
    squares = torch.linalg.svdvals(wanted).square()
    shares = squares.cumsum(0) / squares.sum()
    rank = int((shares < 0.9).sum()) + 1
    assert result.offset["l0.offset_b"].shape == (shape[0], rank)
    assert result.offset["l0.offset_a"].shape == (rank, shape[1])
    lost = float(squares[rank:].sum()) ** 0.5
    missed = float((wanted - dense(result.offset, "l0").double()).norm())
    assert missed == pytest.approx(lost, rel=1e-4)
    assert lost > 0.01 * float(exact.norm())
    assert result.error == pytest.approx(lost / float(exact.norm()), rel=1e-4)


@both
def test_the_whole_offset_has_the_rank_of_the_matrix(rule: str) -> None:
    # Deviations from a mean add up to zero, so that of three sites' directions two are free.
    contributions = random_sites(3, [(40, 44, 2)])
    result = aggregate(rule, contributions)
    rank = 4 if rule == "residual" else 6
    assert result.offset["l0.offset_a"].shape == (rank, 44)
    dense = random_sites(12, [(40, 44, 2)])
    rank = 22 if rule == "residual" else 24
    assert aggregate(rule, dense).offset["l0.offset_a"].shape == (rank, 44)
    many = random_sites(60, [(40, 44, 2)])
    assert aggregate(rule, many).offset["l0.offset_a"].shape == (40, 44)


@both
@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_no_size_of_the_products_overflows(rule: str, scale: float) -> None:
    contributions = random_sites(12, [(32, 40, 3)], dtype=torch.float64)
    for one in contributions:
        one.tensors["l0.lora_b"].mul_(scale)
    result = aggregate(rule, contributions)
    exact = exact_products(contributions)
    found = {stem: product / scale for stem, product in held(result).items()}
    assert apart(found, {stem: one / scale for stem, one in exact.items()}) < 1e-6


@both
def test_what_float32_does_not_resolve_is_not_sent(rule: str) -> None:
    one = site("a", 1, a=[[1.0, 0.0], [0.0, 1.0]], b=[[1.0, 0.0], [0.0, 1e-9]])
    result = aggregate(rule, [one])
    if rule == "residual":
        assert not result.offset
    else:
        assert result.offset["q.offset_a"].shape == (1, 2)
    assert result.error < 1e-8


def test_the_rounding_of_the_factors_is_made_up_for() -> None:
    contributions = random_sites(3, [(20, 24, 2)], dtype=torch.bfloat16)
    result = fold(Residual(), contributions)
    exact = exact_products(contributions)
    assert apart(held(result), exact) <= 1e-6 * whole(exact)
    assert apart(products(fold(Mean(), contributions).tensors), exact) > 1e-3 * whole(exact)


def test_a_fresh_adapter_is_drawn_by_seed_round_and_name() -> None:
    contributions = random_sites(2, [(30, 900, 4), (30, 900, 4)])
    first = fold(Stack(Round(seed=1, index=2)), contributions)
    a = first.tensors["l0.lora_a"]
    assert float(a.std()) == pytest.approx(1 / math.sqrt(900), rel=0.05)
    assert abs(float(a.mean())) < 3e-3
    assert first.tensors["l0.lora_b"].abs().max() == 0
    assert not torch.equal(a, first.tensors["l1.lora_a"])
    for other in (Round(seed=2, index=2), Round(seed=1, index=3)):
        assert not torch.equal(a, fold(Stack(other), contributions).tensors["l0.lora_a"])
    again = fold(Stack(Round(seed=1, index=2)), contributions[:1])
    assert torch.equal(a, again.tensors["l0.lora_a"])


@pytest.mark.parametrize("rank", [0, 5])
def test_a_fresh_adapter_has_the_federations_rank(rank: int) -> None:
    contributions = of_ranks(random_sites(3, [(8, 9, 3)]), [1, 3, 2])
    result = fold(Stack(Round(rank=rank)), contributions)
    assert result.tensors["l0.lora_a"].shape == (rank or 3, 9)


@both
def test_a_share_of_energy_that_no_cut_keeps_is_refused(rule: str) -> None:
    for energy in (0.0, 1.5, math.nan):
        with pytest.raises(AggregationError, match=r"energy .*; expected a share above 0"):
            aggregate(rule, TWO, Round(energy=energy))


@both
@pytest.mark.parametrize(
    "offset",
    [
        {"q.offset_b": torch.ones(1, 1)},
        {"q.offset_b": torch.ones(1, 1), "q.offset_a": torch.ones(1, 3)},
        {"q.offset_b": torch.ones(1, 2), "q.offset_a": torch.ones(1, 2)},
    ],
)
def test_an_offset_of_another_adapter_is_refused(rule: str, offset: dict) -> None:
    with pytest.raises(AggregationError, match=r"'q.offset_b' is .*go on from the adapter"):
        aggregate(rule, TWO, Round(offset=offset))
