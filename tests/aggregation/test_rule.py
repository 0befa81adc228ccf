"""What holds for every rule, and what none accepts."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from aggregation_cases import (
    equal_bits,
    exact_products,
    federations,
    held,
    of_ranks,
    products,
    random_sites,
    site,
    unequal_federations,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flap_nvflare.aggregation import (
    RULES,
    AggregationError,
    Contribution,
    Round,
    accumulator,
    aggregate,
)
from flap_nvflare.aggregation.rule import Books, relative_error

# Those that take both factors and are means; for the others see test_linear and test_robust.
MEANS = sorted(name for name, rule in RULES.items() if rule.CARD.pairs and not rule.CARD.robust)
rules = pytest.mark.parametrize("rule", MEANS)
MANY = settings(deadline=None, max_examples=40)


@rules
@MANY
@given(unequal_federations(), st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_bits(
    rule: str, contributions: list[Contribution], random: Any
) -> None:
    shuffled = [
        Contribution(one.site, one.weight, dict(reversed(one.tensors.items())))
        for one in contributions
    ]
    random.shuffle(shuffled)
    before = aggregate(rule, contributions)
    later = Round(index=1, offset=before.offset, memory=before.memory)
    for round in (Round(), later):
        first = aggregate(rule, contributions, round)
        for tensors in (first.tensors, first.offset, first.memory):
            assert list(tensors) == sorted(tensors)
        assert equal_bits(first, aggregate(rule, shuffled, round))
        assert equal_bits(first, aggregate(rule, contributions, round))


@rules
@MANY
@given(federations(), st.integers(1, 4))
def test_equal_updates_stay_as_they_are_in_product_and_offset(
    rule: str, contributions: list[Contribution], count: int
) -> None:
    one = contributions[0]
    result = aggregate(rule, [Contribution(str(k), k + 0.3, one.tensors) for k in range(count)])
    expected = products(dict(one.tensors))
    for stem, product in held(result).items():
        torch.testing.assert_close(product, expected[stem], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.tensors["head"], one.tensors["head"], rtol=1e-6, atol=0)
    assert result.error < 1e-6


@rules
@MANY
@given(federations())
def test_every_tensor_is_dense_and_its_own(rule: str, contributions: list[Contribution]) -> None:
    # FLARE and safetensors refuse to write views and transposed tensors.
    result = aggregate(rule, contributions)
    tensors = [*result.tensors.values(), *result.offset.values(), *result.memory.values()]
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


@rules
def test_heads_are_the_weighted_mean(rule: str) -> None:
    result = aggregate(rule, [site("b", 1, head=[4.0, 0.0]), site("a", 3, head=[0.0, 8.0])])
    assert result.tensors["head"].tolist() == [1.0, 6.0]
    assert (result.error, result.turned) == (0.0, False)


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_and_shape_of_the_updates(rule: str, dtype: torch.dtype) -> None:
    contributions = random_sites(3, [(4, 6, 2)], dtype=dtype)
    result = aggregate(rule, contributions)
    for name, tensor in contributions[0].tensors.items():
        assert (result.tensors[name].shape, result.tensors[name].dtype) == (tensor.shape, dtype)
        assert result.tensors[name].untyped_storage().nbytes() == result.tensors[name].nbytes


@rules
def test_the_updates_are_left_alone(rule: str) -> None:
    contributions = random_sites(2, [(4, 6, 2)])
    before = [{name: x.clone() for name, x in one.tensors.items()} for one in contributions]
    result = aggregate(rule, contributions)
    for tensor in result.tensors.values():
        tensor.zero_()
    for one, tensors in zip(contributions, before, strict=True):
        assert all(torch.equal(one.tensors[name], tensors[name]) for name in tensors)


@rules
def test_only_shares_of_weight_matter(rule: str) -> None:
    contributions = random_sites(3, [(4, 6, 2)])
    first = aggregate(rule, contributions)
    scaled = [Contribution(one.site, one.weight * 2.0**900, one.tensors) for one in contributions]
    assert equal_bits(first, aggregate(rule, scaled))


@rules
def test_all_zero_products_give_no_error_and_no_nan(rule: str) -> None:
    contributions = random_sites(3, [(4, 6, 2)])
    for one in contributions:
        one.tensors["l0.lora_b"].zero_()
    result = aggregate(rule, contributions)
    assert result.error == 0.0
    assert whole_is_finite(result.tensors)
    assert held(result)["l0"].abs().max() == 0
    assert not result.offset


@rules
def test_products_that_cancel_have_no_nan(rule: str) -> None:
    plus, minus = site("a", 1, a=[[1.0]], b=[[1.0]]), site("b", 1, a=[[1.0]], b=[[-1.0]])
    result = aggregate(rule, [plus, minus])
    assert exact_products([plus, minus])["q"].item() == 0
    assert abs(held(result)["q"].item()) < 1e-7
    assert math.isfinite(result.error)


@rules
def test_an_offset_and_a_memory_are_held_in_float32_at_least(rule: str) -> None:
    for dtype, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        result = aggregate(rule, random_sites(3, [(4, 6, 2)], dtype=dtype))
        assert bool(result.offset) is RULES[rule].CARD.offset
        assert all(tensor.dtype == expected for tensor in result.offset.values())
        assert all(tensor.dtype == torch.float32 for tensor in result.memory.values())


@rules
@pytest.mark.parametrize("sites", [3, 9], ids=["stacked", "dense"])
def test_sites_of_unequal_ranks_get_an_adapter_of_the_largest(rule: str, sites: int) -> None:
    contributions = of_ranks(random_sites(sites, [(30, 40, 4)]), [2, 4, 1])
    result = aggregate(rule, contributions)
    assert result.tensors["l0.lora_a"].shape == (4, 40)
    assert result.tensors["l0.lora_b"].shape == (30, 4)
    assert whole_is_finite(result.tensors)
    wider = aggregate(rule, contributions, Round(rank=6)).tensors
    assert wider["l0.lora_a"].shape == (6, 40)
    assert (wider["l0.lora_a"].norm(dim=1) > 0.1).all()  # no direction is dead for ever


def whole_is_finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_shares_are_sorted_and_add_up_to_one() -> None:
    books = Books()
    for one in (site("b", 3, head=[1.0]), site("a", 1, head=[2.0])):
        books.enter(one)
    assert list(books.shares().items()) == [("a", 0.25), ("b", 0.75)]


@pytest.mark.parametrize(
    ("squares", "expected"), [((0.0, 0.0), 0.0), ((4.0, 0.0), 1.0), ((1.0, 4.0), 0.5)]
)
def test_relative_error_is_always_a_number(squares: tuple[float, float], expected: float) -> None:
    assert relative_error(*squares) == expected


_HEAD = {"head": [1.0]}
_BAD: list[tuple[str, list[Contribution]]] = [
    ("at least one site", []),
    ("site 'a' contributes twice", [site("a", 1, **_HEAD), site("a", 2, **_HEAD)]),
    *(
        (f"weight {weight} of site 'a'", [site("a", weight, **_HEAD)])
        for weight in (0.0, -1.0, math.nan, math.inf)
    ),
    ("'more' is missing at site 'a'", [site("a", 1), site("b", 1, more=[1.0])]),
    ("'more' is missing at site 'b'", [site("a", 1, more=[1.0]), site("b", 1)]),
    (
        r"'head' is float32 \(2,\) at site 'b', float32 \(1,\) at 'a'",
        [site("a", 1, **_HEAD), site("b", 1, head=[1.0, 2.0])],
    ),
    ("'head' is torch.int64; only floats", [site("a", 1, head=[1])]),
    ("'head' of site 'b' holds nan", [site("a", 1, **_HEAD), site("b", 1, head=[math.nan])]),
    ("'q.lora_b' is missing; send both", [site("a", 1, a=[[1.0]])]),
    (
        r"'q': A is \(1, 2\), B is \(2, 2\); expected \(rank, in\)",
        [site("a", 1, a=[[1.0, 2.0]], b=[[1.0, 0.0], [0.0, 1.0]])],
    ),
    (r"A is \(1,\)", [site("a", 1, a=[1.0], b=[[1.0]])]),
]


@rules
@pytest.mark.parametrize(("text", "contributions"), _BAD, ids=[text for text, _ in _BAD])
def test_what_does_not_fit_together_is_refused(
    rule: str, text: str, contributions: list[Contribution]
) -> None:
    with pytest.raises(AggregationError, match=text):
        aggregate(rule, contributions)


def test_ranks_may_differ_only_where_a_rule_says_so() -> None:
    one = site("a", 1, a=[[1.0]], b=[[1.0]])
    other = site("b", 1, a=[[1.0], [1.0]], b=[[1.0, 1.0]])
    books = Books()
    books.enter(one)
    with pytest.raises(AggregationError, match=r"'q.lora_a' is float32 \(2, 1\) at site 'b'"):
        books.enter(other)
    books = Books(unequal_ranks=True)
    books.enter(one)
    books.enter(other)
    with pytest.raises(AggregationError, match=r"'q.lora_a' is float32 \(rank, 2\) at site 'c'"):
        books.enter(site("c", 1, a=[[1.0, 1.0]], b=[[1.0]]))


@rules
def test_a_refused_update_leaves_no_trace(rule: str) -> None:
    contributions = random_sites(4, [(4, 6, 2), (30, 30, 2)])
    expected = aggregate(rule, contributions)
    bad = {**contributions[3].tensors, "head": torch.full((5,), math.nan)}
    updates = accumulator(rule)
    for one in contributions:
        for wrong in (
            Contribution(one.site, 1.0, bad),
            Contribution(one.site, 1e-300, one.tensors),
            Contribution(one.site, 1e300, one.tensors),
        ):
            with pytest.raises(AggregationError):
                updates.add(wrong)
        updates.add(one)
        with pytest.raises(AggregationError, match="twice"):
            updates.add(one)
    assert equal_bits(updates.result(), expected)


@rules
def test_a_result_can_be_asked_for_at_any_time(rule: str) -> None:
    contributions = random_sites(4, [(4, 6, 2), (30, 30, 2)])
    updates = accumulator(rule)
    for count, one in enumerate(contributions, start=1):
        updates.add(one)
        for _ in range(2):
            assert equal_bits(updates.result(), aggregate(rule, contributions[:count]))


@rules
def test_an_update_may_change_once_it_was_added(rule: str) -> None:
    contributions = random_sites(2, [(4, 6, 2), (30, 30, 2)])
    expected = aggregate(rule, contributions)
    updates = accumulator(rule)
    for one in contributions:
        updates.add(one)
        for tensor in one.tensors.values():
            tensor.zero_()
    assert equal_bits(updates.result(), expected)


@rules
def test_values_too_large_for_their_squares_are_refused(rule: str) -> None:
    large = {"head": torch.tensor([1e76], dtype=torch.float64)}
    with pytest.raises(
        AggregationError, match=r"'head' of site 'a' has a norm above 1e\+75"
    ) as got:
        aggregate(rule, [Contribution("a", 1.0, large)])
    assert got.value.key == "head"
    product = {"head": torch.tensor([1e74], dtype=torch.float64)}
    with pytest.raises(AggregationError, match=r"weight 1e\+150 of site 'a' is too large for"):
        aggregate(rule, [Contribution("a", 1e150, product)])


@rules
def test_more_sites_than_sum_exactly_are_refused(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flap_nvflare.aggregation.rule.MOST", 2)
    with pytest.raises(AggregationError, match="2 updates are the most"):
        aggregate(rule, [site(name, 1, **_HEAD) for name in "abc"])


def test_an_unknown_rule_is_named_with_those_there_are() -> None:
    with pytest.raises(AggregationError, match=r"'mode' is not known.*'mean', .*'svd'"):
        aggregate("mode", [site("a", 1, **_HEAD)])


def test_the_rules_load_neither_flare_nor_monai() -> None:
    code = (
        "import sys, flap_nvflare.aggregation, flap_nvflare.adapter.guard\n"
        "sys.exit(any(name in sys.modules for name in ('nvflare', 'monai')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
