from __future__ import annotations

import pytest
import torch
from aggregation_cases import (
    equal_bits,
    of_ranks,
    products,
    random_sites,
    site,
    unequal_federations,
)
from hypothesis import given, settings

from flap_nvflare.adapter.factors import pairs
from flap_nvflare.aggregation import Contribution, fold
from flap_nvflare.aggregation.ranked import Ranked
from flap_nvflare.aggregation.svd import Svd


def by_slices(contributions: list[Contribution]) -> dict[str, torch.Tensor]:
    """The mean of every slice among the sites that have it, dense."""
    found = {}
    for pair in pairs(contributions[0].tensors):
        largest = max(one.tensors[pair.a].shape[0] for one in contributions)
        total = 0
        for j in range(largest):
            have = [one for one in contributions if one.tensors[pair.a].shape[0] > j]
            whole = sum(one.weight for one in have)
            for one in have:
                a, b = one.tensors[pair.a].double(), one.tensors[pair.b].double()
                total = total + one.weight / whole * torch.outer(b[:, j], a[j])
        found[pair.stem] = total
    return found


def test_a_slice_counts_among_the_sites_that_have_it() -> None:
    # Slice 0: (1 * 2 + 3 * 6) / 4 = 5; slice 1: 4 alone, where the plain mean has 3.
    small = site("a", 1, a=[[1.0, 0.0]], b=[[2.0], [0.0]])
    large = site("b", 3, a=[[1.0, 0.0], [0.0, 1.0]], b=[[6.0, 0.0], [0.0, 4.0]])
    expected = torch.tensor([[5.0, 0.0], [0.0, 4.0]]).double()
    result = fold(Ranked(), [small, large])
    torch.testing.assert_close(products(result.tensors)["q"], expected, rtol=1e-6, atol=1e-6)
    assert result.error < 1e-7
    plain = products(fold(Svd(), [small, large]).tensors)["q"]
    assert plain[1, 1].item() == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize(("sites", "bits"), [(5, True), (20, False)], ids=["stacked", "dense"])
def test_with_equal_ranks_it_is_svd(sites: int, bits: bool) -> None:
    contributions = random_sites(sites, [(40, 44, 3)])
    ranked, svd = fold(Ranked(), contributions), fold(Svd(), contributions)
    for name, tensor in svd.tensors.items():
        torch.testing.assert_close(ranked.tensors[name], tensor, rtol=1e-6, atol=1e-6)
    assert ranked.error == pytest.approx(svd.error, rel=1e-9)
    assert equal_bits(ranked, svd) or not bits


@settings(deadline=None, max_examples=60)
@given(unequal_federations())
def test_the_best_cut_of_the_mean_by_slices(contributions: list[Contribution]) -> None:
    found = products(fold(Ranked(), contributions).tensors)
    for stem, exact in by_slices(contributions).items():
        rank = max(one.tensors[f"{stem}.lora_a"].shape[0] for one in contributions)
        left = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
        missed = float((found[stem] - exact).norm())
        assert missed == pytest.approx(float(left), rel=1e-4, abs=1e-5 * float(exact.norm()))


@pytest.mark.parametrize("sites", [5, 20], ids=["stacked", "dense"])
def test_the_global_adapter_does_not_collapse(sites: int) -> None:
    # All hold the same adapter, but one alone at full rank: round after round it stays whole.
    one = random_sites(1, [(40, 44, 4)])[0]
    expected = products(dict(one.tensors))["l0"]
    tensors = {"ranked": one.tensors, "svd": one.tensors}
    for _ in range(4):
        for name, rule in (("ranked", Ranked), ("svd", Svd)):
            alike = [Contribution(f"{k:02d}", 1.0, tensors[name]) for k in range(sites)]
            sent = of_ranks(alike, [4] + [1] * (sites - 1))
            tensors[name] = fold(rule(), sent).tensors
    torch.testing.assert_close(products(tensors["ranked"])["l0"], expected, rtol=0, atol=1e-3)
    values = torch.linalg.svdvals(products(tensors["svd"])["l0"])
    assert values[1] < 0.01 * values[0]
