from __future__ import annotations

import pytest
import torch
from aggregation_cases import (
    dense_error,
    exact_products,
    federations,
    products,
    random_sites,
    site,
    unequal_federations,
    whole,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flap_nvflare.aggregation import AggregationError, Contribution, Round, fold
from flap_nvflare.aggregation.mean import Mean
from flap_nvflare.aggregation.svd import FIXED_GAUGES, Svd

gauges = pytest.mark.parametrize("gauge", FIXED_GAUGES)


def cut_to(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_two_sites_by_hand() -> None:
    # The mean of 3 e1 e1^T and 2 e2 e2^T is diag(1.5, 1): the second entry is cut.
    one = site("a", 1, a=[[1.0, 0.0]], b=[[3.0], [0.0]])
    other = site("b", 1, a=[[0.0, 1.0]], b=[[0.0], [2.0]])
    result = fold(Svd(), [one, other])
    root = 1.5**0.5
    torch.testing.assert_close(result.tensors["q.lora_b"], torch.tensor([[root], [0.0]]))
    torch.testing.assert_close(result.tensors["q.lora_a"], torch.tensor([[root, 0.0]]))
    assert result.error == pytest.approx(1 / (1.5**2 + 1) ** 0.5, rel=1e-12)
    assert result.turned
    paper = fold(Svd(Round(gauge="paper")), [one, other])
    torch.testing.assert_close(paper.tensors["q.lora_b"], torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(paper.tensors["q.lora_a"], torch.tensor([[1.5, 0.0]]))


@settings(deadline=None)
@given(federations())
def test_never_further_than_the_mean_of_factors(contributions: list[Contribution]) -> None:
    assert fold(Svd(), contributions).error <= fold(Mean(), contributions).error + 1e-7


@settings(deadline=None)
@given(federations(), st.sampled_from(FIXED_GAUGES))
def test_the_reported_error_is_the_dense_one(contributions: list[Contribution], gauge: str) -> None:
    assume(whole(exact_products(contributions)) > 1e-2)
    result = fold(Svd(Round(gauge=gauge)), contributions)
    assert result.error == pytest.approx(dense_error(result, contributions), rel=1e-4, abs=1e-6)


@settings(deadline=None)
@given(federations(), st.sampled_from(FIXED_GAUGES))
def test_as_good_as_the_dense_svd(contributions: list[Contribution], gauge: str) -> None:
    found = products(fold(Svd(Round(gauge=gauge)), contributions).tensors)
    for stem, exact in exact_products(contributions).items():
        rank = contributions[0].tensors[stem + ".lora_a"].shape[0]
        values = torch.linalg.svdvals(exact)
        size = float(exact.norm())
        best = float((exact - cut_to(exact, rank)).norm())
        assert float((found[stem] - exact).norm()) <= best + 1e-5 * size
        gap = float(values[rank - 1] - values[rank]) if rank < len(values) else size
        if gap > 0.05 * size:  # otherwise the best cut is not the only one
            assert float((found[stem] - cut_to(exact, rank)).norm()) <= 1e-5 * size


@gauges
@pytest.mark.parametrize("shape", [(48, 40, 4), (6, 40, 4), (40, 6, 4), (4, 4, 4)])
def test_factors_have_the_gauge_asked_for(gauge: str, shape: tuple[int, int, int]) -> None:
    result = fold(Svd(Round(gauge=gauge)), random_sites(5, [shape], dtype=torch.float64))
    b, a = result.tensors["l0.lora_b"], result.tensors["l0.lora_a"]
    strength = torch.linalg.svdvals(b @ a)[:4]
    on_b, on_a = (strength, strength) if gauge == "balanced" else (1, strength**2)
    torch.testing.assert_close(b.T @ b, torch.eye(4).double() * on_b)
    torch.testing.assert_close(a @ a.T, torch.eye(4).double() * on_a)
    largest = b.abs().argmax(dim=0, keepdim=True)
    assert (b.gather(0, largest) > 0).all()


@gauges
def test_the_sites_own_gauge_does_not_matter(gauge: str) -> None:
    contributions = random_sites(3, [(7, 9, 2)], dtype=torch.float64)
    turn = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    turned = [
        Contribution(
            one.site,
            one.weight,
            {
                **one.tensors,
                "l0.lora_a": torch.linalg.inv(turn) @ one.tensors["l0.lora_a"],
                "l0.lora_b": one.tensors["l0.lora_b"] @ turn,
            },
        )
        for one in contributions
    ]
    first, second = (
        fold(Svd(Round(gauge=gauge)), contributions),
        fold(Svd(Round(gauge=gauge)), turned),
    )
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(tensor, second.tensors[name], rtol=1e-9, atol=1e-11)


@gauges
def test_a_zero_product_keeps_the_adapter_alive(gauge: str) -> None:
    contributions = random_sites(3, [(8, 6, 3)], drift=0.0, dtype=torch.float64)
    for one in contributions:
        one.tensors["l0.lora_b"].zero_()
    result = fold(Svd(Round(gauge=gauge)), contributions)
    a, start = result.tensors["l0.lora_a"], contributions[0].tensors["l0.lora_a"]
    assert result.tensors["l0.lora_b"].abs().max() == 0
    assert result.error == 0
    # The same directions at the same lengths as the sites' common A, turned to be orthogonal.
    torch.testing.assert_close(a.T @ a, start.T @ start)
    torch.testing.assert_close(a @ a.T, torch.diag(torch.linalg.svdvals(start) ** 2))


@gauges
def test_missing_directions_alone_are_made_alive(gauge: str) -> None:
    contributions = random_sites(2, [(8, 6, 3)], drift=0.0)
    for one in contributions:
        one.tensors["l0.lora_b"][:, 1:] = 0
    result = fold(Svd(Round(gauge=gauge)), contributions)
    a, b = result.tensors["l0.lora_a"].double(), result.tensors["l0.lora_b"].double()
    assert (b.abs().amax(dim=0) > 0).tolist() == [True, False, False]
    assert (a.norm(dim=1) > 0.1).all()
    grams = a @ a.T
    torch.testing.assert_close(grams, torch.diag(grams.diag()), rtol=0, atol=1e-5)
    assert dense_error(result, contributions) < 1e-6
    assert result.error < 1e-6


@gauges
def test_an_adapter_of_zeros_comes_alive(gauge: str) -> None:
    zeros = site("a", 1, a=[[0.0] * 3] * 2, b=[[0.0] * 2] * 4)
    result = fold(Svd(Round(gauge=gauge)), [zeros])
    assert (result.tensors["q.lora_a"].norm(dim=1) > 0).all()
    assert result.tensors["q.lora_b"].abs().max() == 0
    assert result.error == 0


@gauges
@pytest.mark.parametrize("shape", [(2, 9, 4), (9, 2, 4), (1, 1, 3)])
def test_a_rank_above_a_side_is_exact(gauge: str, shape: tuple[int, int, int]) -> None:
    contributions = random_sites(3, [shape])
    result = fold(Svd(Round(gauge=gauge)), contributions)
    assert result.error < 1e-7
    assert dense_error(result, contributions) < 1e-6
    assert result.tensors["l0.lora_a"].shape == (shape[2], shape[1])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.tensors.values())


def test_one_site_keeps_its_product() -> None:
    contributions = random_sites(1, [(7, 9, 2), (9, 7, 2)])
    result = fold(Svd(), contributions)
    expected = products(dict(contributions[0].tensors))
    for stem, product in products(result.tensors).items():
        torch.testing.assert_close(product, expected[stem], rtol=0, atol=1e-5)
    assert result.error < 1e-7


def test_sites_with_more_rank_than_the_matrix() -> None:
    contributions = random_sites(6, [(24, 24, 8)], drift=2.0)
    result = fold(Svd(), contributions)
    exact = exact_products(contributions)["l0"]
    torch.testing.assert_close(
        products(result.tensors)["l0"], cut_to(exact, 8), rtol=0, atol=1e-5 * float(exact.norm())
    )


@pytest.mark.parametrize("drift", [0.0, 0.1, 1.0])
def test_many_sites_are_cut_as_the_dense_svd_cuts(drift: float) -> None:
    contributions = random_sites(40, [(48, 64, 4), (96, 80, 4)], drift=drift)
    result, means = fold(Svd(), contributions), fold(Mean(), contributions)
    for stem, exact in exact_products(contributions).items():
        found = products(result.tensors)[stem]
        assert float((found - cut_to(exact, 4)).norm()) <= 1e-5 * float(exact.norm())
    assert result.error <= means.error + 1e-12
    if drift:
        assert result.error == pytest.approx(dense_error(result, contributions), rel=1e-4)
        assert means.error == pytest.approx(dense_error(means, contributions), rel=1e-4)


def test_a_rank_below_the_sites_is_cut_to() -> None:
    for count in (3, 12):  # stacked, dense
        contributions = random_sites(count, [(32, 40, 4)])
        result = fold(Svd(Round(rank=2)), contributions)
        expected = cut_to(exact_products(contributions)["l0"], 2)
        torch.testing.assert_close(products(result.tensors)["l0"], expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(unequal_federations())
def test_unequal_ranks_are_cut_as_the_dense_svd_cuts(contributions: list[Contribution]) -> None:
    result = fold(Svd(), contributions)
    assume(whole(exact_products(contributions)) > 1e-2)
    for stem, exact in exact_products(contributions).items():
        rank = max(one.tensors[stem + ".lora_a"].shape[0] for one in contributions)
        best = float((exact - cut_to(exact, rank)).norm())
        found = float((products(result.tensors)[stem] - exact).norm())
        assert found <= best + 1e-5 * float(exact.norm())
    assert result.error == pytest.approx(dense_error(result, contributions), rel=1e-4, abs=1e-6)


def test_an_unknown_gauge_is_refused() -> None:
    with pytest.raises(AggregationError, match=r"gauge 'polar' is not known.*'balanced', 'paper'"):
        Svd(Round(gauge="polar"))
