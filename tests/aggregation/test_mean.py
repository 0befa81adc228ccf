from __future__ import annotations

import pytest
from aggregation_cases import dense_error, exact_products, federations, random_sites, site, whole
from hypothesis import assume, given, settings

from flap_nvflare.aggregation import Contribution, fold
from flap_nvflare.aggregation.mean import Mean


def test_two_sites_by_hand() -> None:
    # B A is 1 * 1 and 3 * 3: their mean is 5, the product of the means 2 * 2 = 4.
    result = fold(Mean(), [site("a", 1, a=[[1.0]], b=[[1.0]]), site("b", 1, a=[[3.0]], b=[[3.0]])])
    assert result.tensors["q.lora_a"].item() == result.tensors["q.lora_b"].item() == 2
    assert result.error == pytest.approx(1 / 5, rel=1e-12)
    assert not result.turned


def test_the_error_is_over_all_pairs_together() -> None:
    one, other = site("a", 1, a=[[1.0]], b=[[1.0]]), site("b", 1, a=[[3.0]], b=[[3.0]])
    extra = {"v.lora_a": one.tensors["q.lora_a"] * 12, "v.lora_b": one.tensors["q.lora_b"]}
    both = [Contribution(x.site, 1, {**x.tensors, **extra}) for x in (one, other)]
    # Errors 1 and 0, exact products 5 and 12.
    assert fold(Mean(), both).error == pytest.approx(1 / 13, rel=1e-12)


def test_opposite_errors_do_not_cancel() -> None:
    one = site("a", 1, a=[[1.0]], b=[[1.0]])
    other = site("b", 1, a=[[3.0]], b=[[3.0]])
    mirrored = [
        Contribution(
            x.site,
            1,
            {
                **x.tensors,
                "v.lora_a": x.tensors["q.lora_a"],
                "v.lora_b": -x.tensors["q.lora_b"],
            },
        )
        for x in (one, other)
    ]
    assert fold(Mean(), mirrored).error == pytest.approx(1 / 5, rel=1e-12)


@settings(deadline=None)
@given(federations())
def test_the_error_is_the_dense_one(contributions: list[Contribution]) -> None:
    assume(whole(exact_products(contributions)) > 1e-2)
    result = fold(Mean(), contributions)
    assert result.error == pytest.approx(dense_error(result, contributions), rel=1e-4, abs=1e-6)


def test_the_error_of_near_equal_updates_is_not_lost_in_rounding() -> None:
    contributions = random_sites(3, [(16, 17, 2)], drift=0.0)
    nearly = [
        Contribution(one.site, 1, {n: x.double() for n, x in one.tensors.items()})
        for one in contributions
    ]
    nearly[0].tensors["l0.lora_a"][0, 0] += 1e-6
    nearly[0].tensors["l0.lora_b"][0, 0] += 1e-6
    # One site of three moves: the error is (1/3 - 1/9) * 1e-12 in one entry of the product.
    expected = (2 / 9) * 1e-12 / whole(exact_products(nearly))
    assert fold(Mean(), nearly).error == pytest.approx(expected, rel=1e-3)
