"""The robust rules: by hand, against dense matrices, and against hostile sites."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from aggregation_cases import equal_bits, federations, products, random_sites, site, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from flap_nvflare.adapter.factors import pairs
from flap_nvflare.aggregation import (
    AggregationError,
    Contribution,
    Round,
    accumulator,
    aggregate,
    geometry,
)
from flap_nvflare.aggregation.geometry import distances_from, gram_matrix, squared_distance

GAUGES = ("balanced", "paper")

rules = pytest.mark.parametrize("rule", ["krum", "median"])
NOBODY = Round(hostile=0)


def dense(tensors: Any) -> torch.Tensor:
    """All products of an adapter as one long vector."""
    return torch.cat([product.flatten() for _, product in sorted(products(dict(tensors)).items())])


def scalar(name: str, product: float, head: float = 0.0, weight: float = 1.0) -> Contribution:
    """An adapter of one number, B A = `product`."""
    return site(name, weight, a=[[1.0]], b=[[product]], head=[head])


def numbers(result: Any) -> tuple[float, float]:
    return products(result.tensors)["q"].item(), result.tensors["head"].item()


START = {"q.lora_a": torch.tensor([[1.0]]), "q.lora_b": torch.tensor([[10.0]])}


def test_median_by_hand() -> None:
    # Changes 1, 2, 3, -1, 90 from 10; the median length is 2, so they count 1, 2, 2, -1, 2.
    sites = [
        scalar(name, 10.0 + change, head)
        for name, change, head in zip(
            "abcde", [1, 2, 3, -1, 90], [7.0, -1e9, 4.0, 5.0, 6.0], strict=True
        )
    ]
    result = aggregate("median", sites, Round(start=START))
    assert numbers(result) == pytest.approx((10 + 6 / 5, 5.0), rel=1e-6)
    assert (result.excluded, result.turned) == ((), True)
    assert result.error < 1e-9


def test_median_of_an_even_number_lies_between_the_middle_two() -> None:
    sites = [
        site(name, 1, head=[value])
        for name, value in [("a", 8.0), ("b", 1.0), ("c", 2.0), ("d", 4.0)]
    ]
    result = aggregate("median", sites)
    assert result.tensors["head"].tolist() == [3.0]
    assert (result.error, result.turned) == (0.0, False)


def test_krum_by_hand() -> None:
    # Of five sites and one hostile each has 5 - 1 - 2 = 2 nearest: scores of the products
    # 11, 12, 13, 14, 40 are 5, 2, 2, 5 and 26^2 + 27^2; the last is left out.
    # Changes 1, 2, 3, 4, the median 2.5: they count 1, 2, 2.5, 2.5. Heads 2, 3, 4 are left.
    sites = [
        scalar(name, product, head)
        for name, product, head in zip(
            "abcde", [11.0, 12.0, 13.0, 14.0, 40.0], [1e9, 3.0, 2.0, 4.0, -5.0], strict=True
        )
    ]
    result = aggregate("krum", sites, Round(start=START))
    assert numbers(result) == pytest.approx((10 + 8 / 4, 3.0), rel=1e-6)
    assert result.excluded == ("e",)


def test_krum_leaves_out_the_last_name_of_equals() -> None:
    tensors = random_sites(1, [(7, 9, 2)])[0].tensors
    sites = [Contribution(name, 1.0, tensors) for name in "ebdac"]
    assert aggregate("krum", sites).excluded == ("e",)


@rules
def test_a_claimed_weight_counts_up_to_the_next_largest(rule: str) -> None:
    sites = [scalar(name, 10.0, weight=1.0) for name in "abcd"]
    greedy = [*sites, scalar("e", 11.0, weight=1e6)]
    modest = [*sites, scalar("e", 11.0, weight=1.0)]
    known = Round(start={**START, "q.lora_b": torch.tensor([[8.0]])})
    assert equal_bits(aggregate(rule, greedy, known), aggregate(rule, modest, known))


@rules
@settings(deadline=None, max_examples=40)
@given(federations(), st.integers(0, 2**31))
def test_the_clipped_mean_against_dense_matrices(
    rule: str, contributions: list[Contribution], seed: int
) -> None:
    known = dict(random_sites(1, _shapes(contributions[0]), seed=seed)[0].tensors)
    result = aggregate(rule, contributions, Round(hostile=0, start=known))
    origin = dense(known)
    changes = [dense(one.tensors) - origin for one in contributions]
    bound = statistics.median([float(change.norm()) for change in changes])
    total = sum(one.weight for one in contributions)
    expected = origin.clone()
    for one, change in zip(contributions, changes, strict=True):
        expected += one.weight / total * min(1.0, bound / float(change.norm())) * change
    # The cut of each adapter is the nearest of its rank, so the distance is known, too.
    lost, position, found = 0.0, 0, products(result.tensors)
    for stem in sorted(found):
        rows, columns = found[stem].shape
        part = expected[position : position + rows * columns].view(rows, columns)
        rank, position = result.tensors[stem + ".lora_a"].shape[0], position + part.numel()
        lost += float(torch.linalg.svdvals(part)[rank:].square().sum())
        best = float(torch.linalg.svdvals(part)[rank:].square().sum()) ** 0.5
        assert float((found[stem] - part).norm()) <= best + 1e-5 * float(expected.norm())
    assert result.error == pytest.approx(lost**0.5 / float(expected.norm()), abs=1e-6)


def _shapes(one: Contribution) -> list[tuple[int, int, int]]:
    return [
        (one.tensors[pair.b].shape[0], one.tensors[pair.a].shape[1], one.tensors[pair.a].shape[0])
        for pair in pairs(one.tensors)
    ]


@settings(deadline=None, max_examples=40)
@given(federations())
def test_geometry_is_that_of_the_dense_products(contributions: list[Contribution]) -> None:
    vectors = [dense(one.tensors) for one in contributions]
    gram = gram_matrix([one.tensors for one in contributions], pairs(contributions[0].tensors))
    size = max(float(vector.norm()) for vector in vectors)
    for one, vector in enumerate(vectors):
        for other, second in enumerate(vectors):
            assert float(gram[one, other]) == pytest.approx(
                float(vector @ second), abs=1e-9 * size**2
            )
            assert squared_distance(gram, one, other) ** 0.5 == pytest.approx(
                float((vector - second).norm()), abs=1e-6 * size
            )
    tensors = [one.tensors for one in contributions]
    lengths = distances_from(tensors[0], tensors, pairs(tensors[0]))
    assert lengths[0] == 0
    for length, vector in zip(lengths, vectors, strict=True):
        assert length == pytest.approx(float((vector - vectors[0]).norm()), abs=1e-6 * size)


@settings(deadline=None, max_examples=40)
@given(federations())
def test_both_ways_to_the_inner_products_agree(contributions: list[Contribution]) -> None:
    vectors = [one.tensors for one in contributions]
    for pair in pairs(vectors[0]):
        stacked = geometry._gram_of_factors(vectors, pair)
        formed = geometry._gram_of_products(vectors, pair)
        assert torch.equal(formed, formed.mT)
        size = float(stacked.diagonal().max())
        torch.testing.assert_close(stacked, formed, rtol=0, atol=1e-12 * size)


def test_products_are_formed_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    contributions = random_sites(11, [(7, 9, 2)])
    vectors, pair = [one.tensors for one in contributions], pairs(contributions[0].tensors)[0]
    expected = geometry._gram_of_factors(vectors, pair)
    monkeypatch.setattr(geometry, "_FORMED", 2 * 11 * 9)  # two of the seven rows
    torch.testing.assert_close(geometry._gram_of_products(vectors, pair), expected)


def test_the_way_to_the_inner_products_is_chosen_by_the_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(geometry, "_gram_of_products", lambda vectors, pair: "formed")
    monkeypatch.setattr(geometry, "_gram_of_factors", lambda vectors, pair: "stacked")
    one = random_sites(1, [(768, 768, 32)])[0].tensors
    ways = [geometry._gram_of([one] * count, pairs(one)[0]) for count in (6, 38, 39, 100)]
    assert ways == ["stacked", "stacked", "formed", "formed"]


@rules
@settings(deadline=None, max_examples=40)
@given(federations(), st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_bits(
    rule: str, contributions: list[Contribution], random: Any
) -> None:
    known = Round(hostile=0, start=contributions[0].tensors)
    first = aggregate(rule, contributions, known)
    shuffled = list(contributions)
    random.shuffle(shuffled)
    assert equal_bits(first, aggregate(rule, shuffled, known))


def test_krum_excludes_the_same_in_any_order() -> None:
    contributions = random_sites(9, [(20, 24, 2), (3, 5, 2)], drift=2.0)
    first = aggregate("krum", contributions, Round(hostile=3))
    again = aggregate("krum", contributions[::-1], Round(hostile=3))
    assert len(first.excluded) == 3
    assert list(first.excluded) == sorted(first.excluded)
    assert first.excluded == again.excluded
    assert equal_bits(first, again)


@rules
@settings(deadline=None, max_examples=30)
@given(federations(), st.integers(5, 8))
def test_equal_updates_stay_as_they_are_in_product(
    rule: str, contributions: list[Contribution], count: int
) -> None:
    one = contributions[0]
    same = [Contribution(str(k), k + 0.3, one.tensors) for k in range(count)]
    for start in ({}, one.tensors, contributions[-1].tensors):
        result = aggregate(rule, same, Round(start=start))
        expected = products(dict(one.tensors))
        for stem, product in products(result.tensors).items():
            torch.testing.assert_close(product, expected[stem], rtol=0, atol=2e-5)
        torch.testing.assert_close(result.tensors["head"], one.tensors["head"])
        assert result.error < 1e-6


@rules
def test_a_minority_moves_the_result_no_further_than_honest_sites_do(rule: str) -> None:
    known = random_sites(1, [(12, 10, 2), (6, 9, 2)], seed=5)[0]
    generator = torch.Generator().manual_seed(3)
    honest = [
        Contribution(
            f"honest-{k}",
            1.0,
            {n: x + 0.05 * torch.randn(x.shape, generator=generator) for n, x in start.items()},
        )
        for k, start in enumerate([known.tensors] * 7)
    ]
    longest = max(float((dense(one.tensors) - dense(known.tensors)).norm()) for one in honest)
    for size in (1.0, 1e3, 1e30):
        wrong = {n: size * torch.randn(x.shape, generator=generator) for n, x in
                 known.tensors.items()}  # fmt: skip
        attack = [Contribution(f"bad-{k}", 1e6, wrong) for k in range(2)]
        result = aggregate(rule, [*attack, *honest], Round(hostile=2, start=known.tensors))
        moved = float((dense(result.tensors) - dense(known.tensors)).norm())
        assert moved <= 2 * longest  # the cut may double the distance, no more
        heads = torch.stack([one.tensors["head"] for one in honest])
        head = result.tensors["head"]
        assert bool(((heads.amin(0) <= head) & (head <= heads.amax(0))).all())
        if rule == "krum":
            assert result.excluded == ("bad-0", "bad-1")


@rules
@pytest.mark.parametrize("gauge", GAUGES)
def test_the_sites_own_basis_does_not_matter(rule: str, gauge: str) -> None:
    contributions = random_sites(6, [(7, 9, 2)], dtype=torch.float64)
    turn = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    turned = [
        dataclasses.replace(
            one,
            tensors={
                **one.tensors,
                "l0.lora_a": torch.linalg.inv(turn) @ one.tensors["l0.lora_a"],
                "l0.lora_b": one.tensors["l0.lora_b"] @ turn,
            },
        )
        for one in contributions
    ]
    first, second = (aggregate(rule, some, Round(gauge=gauge)) for some in (contributions, turned))
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(tensor, second.tensors[name], rtol=1e-9, atol=1e-11)
    assert first.excluded == second.excluded


def cut_columns(one: Contribution, rank: int) -> Contribution:
    """The update with the first `rank` rows of A and columns of B alone."""
    tensors = dict(one.tensors)
    for pair in pairs(tensors):
        tensors[pair.a] = tensors[pair.a][:rank].clone()
        tensors[pair.b] = tensors[pair.b][:, :rank].clone()
    return Contribution(one.site, one.weight, tensors)


@rules
def test_sites_may_have_different_ranks(rule: str) -> None:
    ranks = [4, 1, 2, 4, 3, 2]
    narrow = [
        cut_columns(one, rank)
        for one, rank in zip(random_sites(6, [(9, 11, 4), (30, 20, 4)]), ranks, strict=True)
    ]
    filled = []
    for one in narrow:
        tensors = dict(one.tensors)
        for pair in pairs(tensors):
            a, b = tensors[pair.a], tensors[pair.b]
            missing = 4 - len(a)
            tensors[pair.a] = torch.cat([a, torch.zeros(missing, a.shape[1])])
            tensors[pair.b] = torch.cat([b, torch.zeros(b.shape[0], missing)], dim=1)
        filled.append(Contribution(one.site, one.weight, tensors))
    result, expected = aggregate(rule, narrow), aggregate(rule, filled)
    assert equal_bits(result, expected)
    assert result.tensors["l0.lora_a"].shape == (4, 11)
    assert equal_bits(result, aggregate(rule, narrow[::-1]))
    wider = aggregate(rule, [cut_columns(one, 2) for one in narrow], Round(rank=4))
    assert wider.tensors["l1.lora_b"].shape == (30, 4)


@rules
def test_a_full_round_leaves_no_trace_of_what_was_refused(rule: str) -> None:
    contributions = random_sites(6, [(4, 6, 2), (30, 30, 2)])
    expected = aggregate(rule, contributions)
    before = [{n: x.clone() for n, x in one.tensors.items()} for one in contributions]
    updates = accumulator(rule)
    for one in contributions:
        bad = {**one.tensors, "head": torch.full((5,), math.nan)}
        with pytest.raises(AggregationError, match="nan"):
            updates.add(Contribution(one.site, 1.0, bad))
        updates.add(one)
        with pytest.raises(AggregationError, match="twice"):
            updates.add(one)
    for one, tensors in zip(contributions, before, strict=True):
        assert all(torch.equal(one.tensors[name], tensors[name]) for name in tensors)
        for tensor in one.tensors.values():
            tensor.zero_()  # the message may be used again
    for _ in range(2):
        result = updates.result()
        assert equal_bits(result, expected)
        assert list(result.tensors) == sorted(result.tensors)
        for tensor in result.tensors.values():
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_dtype_and_shape_of_the_updates(rule: str, dtype: torch.dtype) -> None:
    contributions = random_sites(5, [(4, 6, 2)], dtype=dtype)
    start = random_sites(1, [(4, 6, 2)], seed=1)[0].tensors
    for name, tensor in aggregate(rule, contributions, Round(start=start)).tensors.items():
        like = contributions[0].tensors[name]
        assert (tensor.shape, tensor.dtype) == (like.shape, dtype)


@rules
def test_more_sites_than_the_rank_can_stack(rule: str) -> None:
    contributions = random_sites(30, [(24, 20, 4)], drift=0.1)
    result = aggregate(rule, contributions, NOBODY)
    gap = whole(
        {
            stem: product - products(aggregate("svd", contributions).tensors)[stem]
            for stem, product in products(result.tensors).items()
        }
    )
    assert 0 < gap < 0.1 * whole(products(result.tensors))


@pytest.mark.parametrize(
    ("rule", "count", "hostile", "least"),
    [("median", 2, 1, 3), ("median", 4, 2, 5), ("krum", 4, 1, 5), ("krum", 6, 2, 7)],
)
def test_too_few_sites_for_the_hostile_are_refused_with_the_mend(
    rule: str, count: int, hostile: int, least: int
) -> None:
    text = f"{count} sites are too few for hostile: {hostile}, which needs {least}; .*lower hostile"
    with pytest.raises(AggregationError, match=text):
        aggregate(rule, random_sites(count, [(4, 6, 2)]), Round(hostile=hostile))
    aggregate(rule, random_sites(least, [(4, 6, 2)]), Round(hostile=hostile))


@rules
def test_a_start_or_gauge_that_does_not_fit_is_refused(rule: str) -> None:
    contributions = random_sites(5, [(4, 6, 2)])
    with pytest.raises(AggregationError, match="at least one site"):
        aggregate(rule, [])
    with pytest.raises(AggregationError, match="gauge 'polar' is not known"):
        accumulator(rule, Round(gauge="polar"))
    with pytest.raises(AggregationError, match=r"'l0.lora_b' is missing in the round's start"):
        aggregate(rule, contributions, Round(start={"l0.lora_a": torch.zeros(2, 6)}))
    start = {"l0.lora_a": torch.zeros(2, 5), "l0.lora_b": torch.zeros(4, 2)}
    with pytest.raises(AggregationError, match=r"'l0.lora_a' is \(2, 5\) in the round's start"):
        aggregate(rule, contributions, Round(start=start))


def test_weights_keep_their_ratio_below_the_bound() -> None:
    sites: Sequence[Contribution] = [
        scalar(name, product, weight=weight)
        for name, product, weight in [("a", 9.0, 1.0), ("b", 11.0, 3.0), ("c", 11.0, 4.0)]
    ]
    # Lengths are all 1; weights 1, 3, 3 of 7.
    result = aggregate("median", [*sites], Round(start=START))
    assert numbers(result)[0] == pytest.approx(10 + 5 / 7, rel=1e-6)
