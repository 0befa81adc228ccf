"""A trained core between frozen factors, and factors of which one is frozen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flap_nvflare.sam import tuning
from flap_nvflare.sam.lora import LoraLinear, reset_lora
from flap_nvflare.sam.segmenter import Segmenter, build_segmenter
from flap_nvflare.sam.tuning import Parts

SLOTS = {"q": (0, 3), "v": (5, 8)}


def layer(core: bool, seed: int = 0) -> LoraLinear:
    torch.manual_seed(seed)
    made = LoraLinear(nn.Linear(6, 8), SLOTS, 2, core)
    reset_lora(made, torch.Generator().manual_seed(3))
    return made


def network(trains: str, seed: int = 0) -> Segmenter:
    parts = Parts("flap", trains)
    return build_segmenter("vit_t", 48, 2, "flap", 2, seed, None, "random", parts=parts)


def image() -> torch.Tensor:
    return torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_product_with_a_core_by_hand() -> None:
    made = LoraLinear(nn.Linear(2, 3, bias=False), {"v": (1, 2)}, 1, core=True)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        made.v.lora_a.copy_(torch.tensor([[2.0, 3.0]]))
        made.v.lora_b.copy_(torch.tensor([[10.0]]))
        made.v.lora_core.copy_(torch.tensor([[0.5]]))
    # W x = (1, 2, 3); the slot's row gains 10 * 0.5 * (2 * 1 + 3 * 2) = 40.
    assert made(torch.tensor([1.0, 2.0])).tolist() == [1.0, 42.0, 3.0]
    assert made.merged()[1].tolist() == [10.0, 16.0]


def test_only_the_core_has_a_gradient_and_it_is_autograds() -> None:
    made = layer(core=True)
    made.requires_grad_(False)
    for name in SLOTS:
        core = made.get_submodule(name).lora_core
        nn.init.normal_(core)
        core.requires_grad_(True)
    x = torch.randn(5, 6)
    made(x).square().sum().backward()
    for name, (first, last) in SLOTS.items():
        factors = made.get_submodule(name)
        assert factors.lora_a.grad is None
        assert factors.lora_b.grad is None
        core = factors.lora_core.detach().clone().requires_grad_()
        product = factors.lora_b @ core @ factors.lora_a
        rows = x @ (made.weight[first:last] + product).T + made.bias[first:last]
        (expected,) = torch.autograd.grad(rows.square().sum(), core)
        torch.testing.assert_close(factors.lora_core.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_a_frozen_factor_costs_no_gradient_and_the_other_keeps_its_own(frozen: str) -> None:
    both, one = layer(core=False), layer(core=False)
    x = torch.randn(5, 6)
    saved: list[tuple[int, ...]] = []
    for made in (both, one):
        made.weight.requires_grad_(False)
        made.bias.requires_grad_(False)
        for name in SLOTS:
            nn.init.constant_(made.get_submodule(name).lora_b, 0.5)
    for name in SLOTS:
        one.get_submodule(name).get_parameter(frozen).requires_grad_(False)
    both(x).square().sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    ):
        one(x).square().sum().backward()
    for name in SLOTS:
        for factor in ("lora_a", "lora_b"):
            ours = one.get_submodule(name).get_parameter(factor).grad
            theirs = both.get_submodule(name).get_parameter(factor).grad
            assert ours is None if factor == frozen else torch.equal(ours, theirs)
    assert (tuple(x.shape) in saved) is (frozen == "lora_b")  # x is kept for A's gradient alone


def test_network_with_a_core_is_the_merged_network() -> None:
    model, merged = network("core"), network("core")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("lora_core"):
                parameter.normal_(std=0.5, generator=generator)
        for name, module in merged.named_modules():
            if isinstance(module, LoraLinear):
                module.weight.copy_(model.get_submodule(name).merged())
    assert not torch.allclose(model(image()), network("core")(image()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model(image()), merged(image()), rtol=1e-3, atol=1e-3)


def test_a_fresh_core_changes_nothing_and_its_factors_are_nearly_orthonormal() -> None:
    torch.testing.assert_close(network("core")(image()), network("ab")(image()), rtol=0, atol=0)
    torch.manual_seed(0)
    wide = LoraLinear(nn.Linear(2000, 2000), {"q": (0, 2000)}, 4, core=True)
    reset_lora(wide, torch.Generator().manual_seed(3))
    for gram in (wide.q.lora_a @ wide.q.lora_a.T, wide.q.lora_b.T @ wide.q.lora_b):
        torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=5 / math.sqrt(2000))
    assert not wide.q.lora_core.any()


def test_fixed_factors_are_the_seeds() -> None:
    def drawn(trains: str, seed: int) -> dict[str, torch.Tensor]:
        return tuning.fixed(network(trains, seed), Parts("flap", trains))

    assert drawn("ab", 0) == {}
    for trains in ("b", "core"):
        first, second, other = drawn(trains, 0), drawn(trains, 0), drawn(trains, 1)
        assert first
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)
    # A is the one that both factors would start from.
    plain = dict(network("ab").named_parameters())
    assert all(torch.equal(tensor, plain[name]) for name, tensor in drawn("b", 0).items())
