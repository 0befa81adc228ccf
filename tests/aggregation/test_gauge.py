from __future__ import annotations

import pytest
import torch
from aggregation_cases import apart, federations, of_ranks, products, random_sites, site, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from flap_nvflare.aggregation import AggregationError, Contribution, Round, aggregate
from flap_nvflare.aggregation.gauge import aligned

rules = pytest.mark.parametrize("rule", ["ranked", "svd", "tail"])


def factors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.double() for name, x in tensors.items() if name != "head"}


def start_of(contributions: list[Contribution], seed: int, fresh: bool) -> dict[str, torch.Tensor]:
    """A start near the first site, or one whose B is zero."""
    generator = torch.Generator().manual_seed(seed)
    start = {
        name: x + 0.3 * torch.randn(x.shape, generator=generator)
        for name, x in contributions[0].tensors.items()
    }
    return {n: x * 0 if fresh and n.endswith("lora_b") else x for n, x in start.items()}


@rules
@settings(deadline=None, max_examples=50)
@given(federations(), st.integers(0, 2**31), st.booleans())
def test_the_product_stays_and_the_factors_come_nearer(
    rule: str, contributions: list[Contribution], seed: int, fresh: bool
) -> None:
    start = start_of(contributions, seed, fresh)
    turned = aggregate(rule, contributions, Round(start=start, gauge="aligned"))
    fixed = aggregate(rule, contributions, Round(start=start, gauge="balanced"))
    size = whole(products(fixed.tensors))
    assert apart(products(turned.tensors), products(fixed.tensors)) <= 1e-6 * size + 1e-7
    goal = factors(start)
    limit = apart(factors(fixed.tensors), goal)
    assert apart(factors(turned.tensors), goal) <= limit * (1 + 1e-6)
    assert turned.error == pytest.approx(fixed.error, rel=1e-4, abs=1e-7)
    assert (turned.turned, fixed.turned) == (False, True)


def test_an_adapter_that_only_turned_is_turned_back() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(size, generator=generator).double() for size in ((6, 3), (3, 5)))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator).double())[0]
    found_b, found_a = aligned(b @ turn, turn.T @ a, b, a)
    torch.testing.assert_close(found_b, b)
    torch.testing.assert_close(found_a, a)


def test_no_other_turn_is_nearer() -> None:
    generator = torch.Generator().manual_seed(1)
    b, start_b = (torch.randn(6, 3, generator=generator).double() for _ in range(2))
    a, start_a = (torch.randn(3, 5, generator=generator).double() for _ in range(2))
    found = aligned(b, a, start_b, start_a)
    best = (found[0] - start_b).square().sum() + (found[1] - start_a).square().sum()
    for _ in range(200):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator).double())[0]
        for other in (turn, torch.linalg.qr(torch.eye(3).double() + 0.01 * turn)[0]):
            away = (found[0] @ other - start_b).square().sum()
            away += (other.T @ found[1] - start_a).square().sum()
            assert away >= best - 1e-9


@rules
def test_directions_without_product_stay_alive(rule: str) -> None:
    contributions = random_sites(3, [(30, 24, 3)], drift=0.1)
    for one in contributions:
        one.tensors["l0.lora_b"][:, 1:] = 0
    start = {name: x.clone() for name, x in contributions[0].tensors.items()}
    for one in (contributions, [Contribution("a", 1, start)]):
        result = aggregate(rule, one, Round(start=start, gauge="aligned"))
        assert torch.linalg.svdvals(result.tensors["l0.lora_a"])[-1] > 0.1
    # M has one direction; the free rows of A are turned towards those of the start.
    away = result.tensors["l0.lora_a"] - start["l0.lora_a"]
    assert float(away.norm() / start["l0.lora_a"].norm()) < 0.3
    zeros = {name: torch.zeros_like(x) for name, x in start.items()}
    dead = aggregate(rule, [Contribution("a", 1, zeros)], Round(start=zeros, gauge="aligned"))
    assert torch.linalg.svdvals(dead.tensors["l0.lora_a"])[-1] > 0.1
    assert dead.tensors["l0.lora_b"].abs().max() == 0


@rules
def test_nothing_to_align_with_is_refused(rule: str) -> None:
    with pytest.raises(AggregationError, match=r"'aligned' needs the adapter .*'balanced'"):
        aggregate(rule, random_sites(2, [(4, 5, 2)]), Round(gauge="aligned"))


@rules
def test_unequal_ranks_can_not_be_aligned(rule: str) -> None:
    contributions = random_sites(2, [(4, 5, 2)])
    round = Round(start=contributions[0].tensors, gauge="aligned")
    with pytest.raises(
        AggregationError, match=r"'l0.lora_a' of site 'site-1' is \(1, 5\).*'balanced'"
    ):
        aggregate(rule, of_ranks(contributions, [2, 1]), round)
    with pytest.raises(AggregationError, match=r"'l0' started with rank 2, and 3 is wanted"):
        aggregate(rule, contributions, Round(start=round.start, gauge="aligned", rank=3))
    with pytest.raises(AggregationError, match=r"'q.lora_a' .* nothing at the round's start"):
        aggregate(rule, [site("a", 1, a=[[1.0]], b=[[1.0]])], round)
