"""FedNova: weights, scale, and what is exact of the move away from the start."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from aggregation_cases import products, random_sites, site
from hypothesis import given, settings
from hypothesis import strategies as st

from flap_nvflare.aggregation import (
    Aggregate,
    AggregationError,
    Card,
    Contribution,
    Round,
    aggregate,
    card,
)
from flap_nvflare.aggregation.nova import moved_from_start, nova_weights


def test_weights_and_scale_by_hand() -> None:
    # p = 1/4, 3/4; p / tau = 1/8, 1/8; S = 1/4; tau_eff = 1/2 + 18/4 = 5.
    weights, scale = nova_weights({"b": 3.0, "a": 1.0}, {"a": 2, "b": 6})
    assert weights == {"a": 0.5, "b": 0.5}
    assert list(weights) == ["a", "b"]
    assert scale == pytest.approx(1.25)


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 500)), min_size=1, max_size=6),
    st.integers(1, 500),
)
def test_the_scale_is_one_for_equal_steps_and_above_for_others(
    sites: list[tuple[float, int]], step: int
) -> None:
    weights = {str(k): weight for k, (weight, _) in enumerate(sites)}
    found, scale = nova_weights(weights, {str(k): steps for k, (_, steps) in enumerate(sites)})
    assert sum(found.values()) == pytest.approx(1)
    assert scale >= 1 - 1e-12
    same, one = nova_weights(weights, dict.fromkeys(weights, step))
    assert one == pytest.approx(1)
    total = sum(weights.values())
    assert same == pytest.approx({name: weight / total for name, weight in weights.items()})


def nova_of(values: dict[str, torch.Tensor], origin: torch.Tensor, weights: dict[str, float],
            steps: dict[str, int]) -> torch.Tensor:  # fmt: skip
    """x + tau_eff sum p_k (y_k - x) / tau_k, as it is written in the paper."""
    total = sum(weights.values())
    effective = sum(weights[k] / total * steps[k] for k in weights)
    change = sum(weights[k] / total / steps[k] * (values[k] - origin) for k in weights)
    return origin + effective * change


STEPS = {"site-0": 3, "site-1": 40, "site-2": 11}


def round_of(rank: int, seed: int = 0) -> tuple[list[Contribution], Round, dict[str, float], float]:
    """Three sites, whose products have rank 4 together with the start's, and their round."""
    sites = random_sites(3, [(9, 8, rank)], seed=seed, dtype=torch.float64)
    start = random_sites(1, [(9, 8, rank)], seed=seed + 1, dtype=torch.float64)[0].tensors
    weights, scale = nova_weights({one.site: one.weight for one in sites}, STEPS)
    weighted = [dataclasses.replace(one, weight=weights[one.site]) for one in sites]
    return weighted, Round(start=start), {one.site: one.weight for one in sites}, scale


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_heads_and_products_move_as_the_paper_says(seed: int) -> None:
    # Rank 8 holds every product of these sides: no cut loses anything.
    sites, known, weights, scale = round_of(8, seed)
    result = moved_from_start(aggregate("svd", sites, known), card("svd"), known, scale)
    heads = {one.site: one.tensors["head"] for one in sites}
    expected = nova_of(heads, known.start["head"], weights, STEPS)
    torch.testing.assert_close(result.tensors["head"], expected, rtol=1e-9, atol=1e-9)
    dense = {one.site: products(dict(one.tensors))["l0"] for one in sites}
    expected = nova_of(dense, products(dict(known.start))["l0"], weights, STEPS)
    found = products(result.tensors)["l0"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.norm()))
    assert result.turned
    assert result.error < 1e-7


def test_a_rank_that_does_not_suffice_is_cut_to_the_closest() -> None:
    sites, known, _, scale = round_of(2)
    before = aggregate("svd", sites, known)
    result = moved_from_start(before, card("svd"), known, scale)
    origin, made = products(dict(known.start))["l0"], products(before.tensors)["l0"]
    wanted = origin + scale * (made - origin)
    u, s, vh = torch.linalg.svd(wanted)
    torch.testing.assert_close(products(result.tensors)["l0"], (u[:, :2] * s[:2]) @ vh[:2])
    lost = float(s[2:].norm() / s.norm())
    assert lost > 0.01
    assert result.error == pytest.approx(before.error + lost)


def test_a_rate_below_one_moves_products_towards_the_start() -> None:
    start = site("s", 1, a=[[1.0]], b=[[10.0]], head=[2.0]).tensors
    known = Round(start=start)
    made = aggregate("svd", [site("a", 1, a=[[2.0]], b=[[7.0]], head=[4.0])], known)
    result = moved_from_start(made, card("svd"), known, 0.25)
    assert products(result.tensors)["q"].item() == pytest.approx(11, rel=1e-6)
    assert result.tensors["head"].tolist() == [2.5]


def test_linear_rules_move_every_tensor_alike() -> None:
    start = {"q.lora_b": torch.tensor([[1.0]]), "head": torch.tensor([0.0])}
    known = Round(start=start)
    made = aggregate("ffa", [Contribution("a", 1.0, {k: v + 2 for k, v in start.items()})], known)
    result = moved_from_start(made, card("ffa"), known, 1.5)
    assert {name: x.item() for name, x in result.tensors.items()} == {"head": 3.0, "q.lora_b": 4.0}
    assert not result.turned


RESIDUAL = Card(paper="", formula="", exact="yes", offset=True)


def test_an_offset_takes_what_moved_factors_have_too_much() -> None:
    """The whole change B A + offset moves exactly by the scale, in the factors' own basis."""
    generator = torch.Generator().manual_seed(0)

    def pair(kind: str, rank: int) -> dict[str, torch.Tensor]:
        return {
            f"q.{kind}_a": torch.randn(rank, 5, generator=generator, dtype=torch.float64),
            f"q.{kind}_b": torch.randn(6, rank, generator=generator, dtype=torch.float64),
        }

    def whole(factors: dict[str, torch.Tensor], offset: dict[str, torch.Tensor]) -> torch.Tensor:
        return (
            factors["q.lora_b"] @ factors["q.lora_a"] + offset["q.offset_b"] @ offset["q.offset_a"]
        )

    known = Round(start=pair("lora", 2), offset=pair("offset", 1))
    made = Aggregate(pair("lora", 2), error=0.0, turned=False, offset=pair("offset", 3))
    result = moved_from_start(made, RESIDUAL, known, 1.7)
    origin = whole(dict(known.start), dict(known.offset))
    expected = origin + 1.7 * (whole(made.tensors, made.offset) - origin)
    torch.testing.assert_close(whole(result.tensors, result.offset), expected)
    assert not result.turned
    first = moved_from_start(made, RESIDUAL, Round(start=known.start), 1.7)
    assert first.offset["q.offset_b"].shape == (6, 5)


@pytest.mark.parametrize("rule", ["svd", "mean", "median"])
def test_scale_one_and_standing_still_are_fixed_points(rule: str) -> None:
    sites, known, _, _ = round_of(2)
    made = aggregate(rule, sites, known)
    assert moved_from_start(made, card(rule), known, 1.0) is made
    still = Round(start=made.tensors)
    result = moved_from_start(made, card(rule), still, 1.9)
    torch.testing.assert_close(products(result.tensors)["l0"], products(made.tensors)["l0"])
    torch.testing.assert_close(result.tensors["head"], made.tensors["head"])


def test_what_has_no_meaning_is_refused() -> None:
    sites, known, _, _ = round_of(2)
    made = aggregate("svd", sites, known)
    with pytest.raises(AggregationError, match=r"scale 0\.0"):
        moved_from_start(made, card("svd"), known, 0.0)
    with pytest.raises(AggregationError, match="'head' is not in the round's start"):
        moved_from_start(made, card("svd"), Round(), 1.5)
    with pytest.raises(AggregationError, match="starts the adapter afresh"):
        moved_from_start(made, RESIDUAL, known, 1.5)
    with pytest.raises(AggregationError, match="give both for each site"):
        nova_weights({"a": 1.0}, {"b": 1})
    with pytest.raises(AggregationError, match="give both"):
        nova_weights({}, {})
    for weight, steps in ((0.0, 1), (1.0, 0), (float("inf"), 1)):
        with pytest.raises(AggregationError, match="site 'a' has weight"):
            nova_weights({"a": weight}, {"a": steps})
