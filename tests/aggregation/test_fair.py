from __future__ import annotations

import pytest
import torch
from aggregation_cases import (
    dense_error,
    exact_products,
    of_ranks,
    random_sites,
    site,
    unequal_federations,
    whole,
)
from hypothesis import assume, given, settings

from flap_nvflare.aggregation import AggregationError, Contribution, Round, aggregate, fold
from flap_nvflare.aggregation.fair import Fair
from flap_nvflare.aggregation.mean import Mean
from flap_nvflare.aggregation.svd import Svd


def test_two_sites_by_hand() -> None:
    # A = 2, B0 = 2, M = 5, lambda = 0.01 * 4: B = 2 + (5 - 4) * 2 / 4.04.
    result = fold(Fair(), [site("a", 1, a=[[1.0]], b=[[1.0]]), site("b", 1, a=[[3.0]], b=[[3.0]])])
    assert result.tensors["q.lora_a"].item() == 2
    assert result.tensors["q.lora_b"].item() == pytest.approx(2 + 2 / 4.04)
    assert result.error == pytest.approx((1 - 4 / 4.04) / 5, rel=1e-6)
    assert not result.turned


@settings(deadline=None, max_examples=60)
@given(unequal_federations())
def test_between_the_best_cut_and_the_mean(contributions: list[Contribution]) -> None:
    fair = fold(Fair(), contributions).error
    assert fold(Svd(), contributions).error <= fair + 1e-7
    assert fair <= fold(Mean(), contributions).error + 1e-7


@settings(deadline=None, max_examples=60)
@given(unequal_federations())
def test_the_reported_error_is_the_dense_one(contributions: list[Contribution]) -> None:
    assume(whole(exact_products(contributions)) > 1e-2)
    for rule in (Fair(), Mean()):
        result = fold(rule, contributions)
        assert result.error == pytest.approx(dense_error(result, contributions), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("sites", [3, 12], ids=["stacked", "dense"])
@pytest.mark.parametrize("ranks", [[3], [1, 3, 2]], ids=["equal", "unequal"])
def test_the_closed_form_is_the_minimum(sites: int, ranks: list[int]) -> None:
    contributions = of_ranks(random_sites(sites, [(30, 24, 3)], dtype=torch.float64), ranks)
    means, fair = fold(Mean(), contributions).tensors, fold(Fair(), contributions).tensors
    a, b = fair["l0.lora_a"], fair["l0.lora_b"].requires_grad_()
    torch.testing.assert_close(a, means["l0.lora_a"], rtol=1e-12, atol=1e-12)
    pull = 0.01 * (a @ a.T).trace() / 3
    exact = exact_products(contributions)["l0"]
    goal = (exact - b @ a).square().sum() + pull * (b - means["l0.lora_b"]).square().sum()
    goal.backward()
    assert float(b.grad.abs().max()) < 1e-8


def test_an_a_of_zeros_keeps_the_mean_b() -> None:
    zeros = [site(name, 1, a=[[0.0, 0.0]], b=[[value]]) for name, value in (("a", 1.0), ("b", 3.0))]
    result = fold(Fair(), zeros)
    assert result.tensors["q.lora_b"].item() == 2
    assert result.error == 0


@pytest.mark.parametrize("rule", ["fair", "mean", "residual"])
def test_a_rank_above_the_federations_is_refused(rule: str) -> None:
    contributions = random_sites(1, [(8, 9, 3)])
    with pytest.raises(
        AggregationError, match=r"'l0.lora_a' of site 'site-0' has rank 3.*2"
    ) as got:
        aggregate(rule, contributions, Round(rank=2))
    assert got.value.key == "l0.lora_a"


@pytest.mark.parametrize("rule", ["mean", "residual"])
def test_a_mean_of_factors_takes_a_missing_slice_as_zero(rule: str) -> None:
    small = site("a", 1, a=[[2.0]], b=[[2.0]])
    large = site("b", 3, a=[[2.0], [4.0]], b=[[2.0, 8.0]])
    result = aggregate(rule, [large, small])
    assert result.tensors["q.lora_a"].tolist() == [[2.0], [3.0]]
    assert result.tensors["q.lora_b"].tolist() == [[2.0, 6.0]]
