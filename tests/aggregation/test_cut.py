from __future__ import annotations

import pytest
import torch
from aggregation_cases import random_sites

from flap_nvflare.adapter.factors import pairs
from flap_nvflare.aggregation import cut as cut_module
from flap_nvflare.aggregation.cut import cut_product, cut_stack
from flap_nvflare.aggregation.products import Factors, side_by_side
from flap_nvflare.aggregation.svd import GAUGES

gauges = pytest.mark.parametrize("gauge", GAUGES)


def stack_of(
    sites: int, shape: tuple[int, int, int], drift: float = 0.5, live: int | None = None
) -> list[Factors]:
    """Factors of equal weight; only the first `live` columns of B are not zero."""
    contributions = random_sites(sites, [shape], drift=drift, dtype=torch.float64)
    (pair,) = pairs(contributions[0].tensors)
    stack = [
        Factors(one.site, 1 / sites, one.tensors[pair.b], one.tensors[pair.a])
        for one in contributions
    ]
    for one in stack:
        one.b[:, shape[2] if live is None else live :] = 0
    return stack


def mean_a(stack: list[Factors]) -> torch.Tensor:
    return torch.stack([one.a for one in stack]).mean(dim=0)


@gauges
@pytest.mark.parametrize("shape", [(20, 30, 3), (30, 20, 3), (20, 20, 3), (2, 9, 4), (9, 2, 4)])
def test_stack_and_product_are_cut_alike(gauge: str, shape: tuple[int, int, int]) -> None:
    stack = stack_of(3, shape)
    left, right = side_by_side(stack)
    one, other = cut_stack(stack, gauge), cut_product(left @ right, mean_a(stack), gauge)
    live = min(shape)
    torch.testing.assert_close(one.b, other.b, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(one.a[:live], other.a[:live], rtol=1e-9, atol=1e-10)
    assert one.exact == pytest.approx(other.exact, rel=1e-12)
    assert one.lost == pytest.approx(other.lost, rel=1e-9, abs=1e-20)


@gauges
@pytest.mark.parametrize("live", [0, 1, 2])
def test_directions_without_product_are_alike_where_sites_share_a(gauge: str, live: int) -> None:
    stack = stack_of(2, (24, 18, 3), drift=0.0, live=live)
    left, right = side_by_side(stack)
    one, other = cut_stack(stack, gauge), cut_product(left @ right, mean_a(stack), gauge)
    torch.testing.assert_close(one.b, other.b, rtol=1e-9, atol=1e-10)
    # A spare row's sign is that of a singular vector; its line and length are the rule's.
    torch.testing.assert_close(one.a.abs(), other.a.abs(), rtol=1e-9, atol=1e-10)
    assert (other.b[:, live:] == 0).all()
    gram = other.a @ other.a.T
    torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-10)
    assert (gram.diag() > 0.1).all()


def turned(strengths: torch.Tensor, columns: int) -> torch.Tensor:
    """A matrix of these singular values and random singular vectors."""
    rows = len(strengths)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    return (torch.linalg.qr(left)[0] * strengths) @ torch.linalg.qr(right)[0].T


SPECTRA = {
    "drop": torch.cat([torch.arange(8.0, 4.0, -1.0), torch.full((76,), 0.1)]),
    "power law": 1 / torch.arange(1.0, 81.0),
    "geometric": 0.8 ** torch.arange(80.0),
    "hardly falling": torch.linspace(1.0, 0.9, 80),
    "of rank two": torch.cat([torch.tensor([2.0, 1.0]), torch.zeros(78)]),
}


@pytest.mark.parametrize("tall", [True, False], ids=["tall", "wide"])
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_cut_is_the_dense_svds_whatever_the_spectrum(kind: str, tall: bool) -> None:
    strengths = SPECTRA[kind].double()
    product = turned(strengths, 100)
    product = product.T.contiguous() if tall else product
    cut = cut_product(product, torch.zeros(4, product.shape[1]).double(), "balanced")
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ vh[:4]
    assert float((cut.b @ cut.a - expected).norm()) <= 1e-5 * float(product.norm())
    assert cut.lost == pytest.approx(float(strengths[4:].square().sum()), rel=1e-9, abs=1e-25)


def test_where_the_krylov_space_is_too_small_the_eigenvectors_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    whole = cut_module._turned
    monkeypatch.setattr(
        cut_module, "_turned", lambda m, basis, n: asked.append(basis is None) or whole(m, basis, n)
    )
    for kind, expected in (("drop", [False]), ("hardly falling", [False, True])):
        asked.clear()
        cut_product(turned(SPECTRA[kind].double(), 100), torch.zeros(4, 100).double(), "paper")
        assert asked == expected


def test_weak_directions_survive_the_squared_matrix() -> None:
    # Singular values 1 and 1e-6: their squares lie 12 digits apart.
    for side in (6, 80):  # by the eigenvectors, by the Krylov space
        strengths = torch.zeros(side, dtype=torch.float64)
        strengths[:3] = torch.tensor([1.0, 1e-6, 1e-9])
        product = turned(strengths, side)
        cut = cut_product(product, torch.zeros(2, side).double(), "paper")
        assert cut.a.norm(dim=1).tolist() == pytest.approx([1.0, 1e-6], rel=1e-6)
        assert cut.lost == pytest.approx(1e-18, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_no_size_of_the_product_overflows(scale: float) -> None:
    stack = stack_of(3, (12, 10, 2))
    left, right = side_by_side(stack)
    one = cut_product(left @ right, mean_a(stack), "paper")
    other = cut_product(left @ right * scale, mean_a(stack), "paper")
    torch.testing.assert_close(other.a / scale, one.a, rtol=1e-9, atol=1e-12)
    assert other.lost / other.exact == pytest.approx(one.lost / one.exact, rel=1e-9)
