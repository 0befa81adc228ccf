from __future__ import annotations

import pytest
import torch
from aggregation_cases import exact_products, of_ranks, random_sites
from hypothesis import given, settings
from hypothesis import strategies as st

from flap_nvflare.adapter.factors import pairs
from flap_nvflare.aggregation import Contribution
from flap_nvflare.aggregation.products import ProductSum, side_by_side

SHAPE = (14, 12, 2)  # stacked up to three sites: 3 * 2 is half of 12


def summed(contributions: list[Contribution]) -> ProductSum:
    total = ProductSum()
    (pair,) = pairs(contributions[0].tensors)
    for one in contributions:
        total.add(one, pair)
    return total


def shares(contributions: list[Contribution]) -> dict[str, float]:
    whole = sum(one.weight for one in contributions)
    return {one.site: one.weight / whole for one in contributions}


@pytest.mark.parametrize(("sites", "stacked"), [(1, True), (3, True), (4, False), (9, False)])
def test_the_number_of_sites_alone_turns_the_stack_into_a_product(
    sites: int, stacked: bool
) -> None:
    contributions = random_sites(sites, [SHAPE])
    for order in (contributions, contributions[::-1]):
        assert (summed(order).stack(shares(order)) is not None) is stacked


@pytest.mark.parametrize("sites", [3, 4, 9])
def test_either_form_is_the_mean_product(sites: int) -> None:
    contributions = random_sites(sites, [SHAPE])
    total = summed(contributions)
    stack = total.stack(shares(contributions))
    if stack is None:
        found = total.mean(sum(one.weight for one in contributions))
    else:
        left, right = side_by_side(stack)
        found = left @ right
    torch.testing.assert_close(found, exact_products(contributions)["l0"], rtol=0, atol=1e-10)


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_the_dense_product_has_the_same_bits_in_every_order(order: list[int]) -> None:
    contributions = random_sites(6, [SHAPE], drift=3.0)
    first = summed(contributions).mean(1.0)
    assert torch.equal(first, summed([contributions[index] for index in order]).mean(1.0))


def test_a_stack_is_sorted_and_its_own() -> None:
    contributions = random_sites(3, [SHAPE])
    expected = [one.tensors["l0.lora_a"].clone() for one in contributions]
    total = summed(contributions[::-1])
    for one in contributions:
        one.tensors["l0.lora_a"].zero_()
    stack = total.stack(shares(contributions))
    assert stack is not None
    assert [one.site for one in stack] == ["site-0", "site-1", "site-2"]
    assert all(torch.equal(one.a, a) for one, a in zip(stack, expected, strict=True))
    assert sum(one.weight for one in stack) == pytest.approx(1.0)


def test_a_stack_has_no_dense_mean() -> None:
    with pytest.raises(ValueError, match="still stacked"):
        summed(random_sites(1, [SHAPE])).mean(1.0)


def test_the_sum_of_the_ranks_turns_the_stack_whatever_the_order() -> None:
    # Half of 12 is 6: 2 + 1 + 1 + 2 stays stacked, one more does not.
    for ranks, stacked in (([2, 1, 1, 2], True), ([1, 1, 1, 1, 1, 1, 1], False)):
        contributions = of_ranks(random_sites(len(ranks), [SHAPE]), ranks)
        for order in (contributions, contributions[::-1], sorted(contributions, key=str)):
            total = summed(order)
            assert (total.stack(shares(order)) is not None) is stacked
            assert (total.rank, total.shape) == (max(ranks), (14, 12))
