from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flap_nvflare.sam.lora import LoraLinear, add_lora, reset_lora


def _layer(inputs: int, outputs: int, slots: dict[str, tuple[int, int]], rank: int) -> LoraLinear:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(inputs, outputs), slots, rank)
    reset_lora(layer, torch.Generator().manual_seed(3))
    return layer


def test_keys_of_the_base_stay() -> None:
    layer = _layer(4, 6, {"q": (0, 2), "v": (4, 6)}, 1)
    assert sorted(dict(layer.named_parameters())) == [
        "bias", "q.lora_a", "q.lora_b", "v.lora_a", "v.lora_b", "weight",
    ]  # fmt: skip
    assert layer.q.lora_a.shape == (1, 4)
    assert layer.v.lora_b.shape == (2, 1)


def test_product_by_hand() -> None:
    layer = LoraLinear(nn.Linear(2, 3, bias=False), {"v": (1, 2)}, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        layer.v.lora_a.copy_(torch.tensor([[2.0, 3.0]]))
        layer.v.lora_b.copy_(torch.tensor([[10.0]]))
    # W x = (1, 2, 3); the slot's row gains 10 * (2 * 1 + 3 * 2) = 80.
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [1.0, 82.0, 3.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_merged_weight_computes_the_same(inputs: int, rows: int, rank: int, seed: int) -> None:
    slots = {"q": (0, rows), "v": (2 * rows, 3 * rows)}
    layer = _layer(inputs, 3 * rows, slots, rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in slots:
            layer.get_submodule(name).lora_b.normal_(generator=generator)
    x = torch.randn(2, 3, inputs, generator=generator)
    plain = nn.functional.linear(x, layer.merged(), layer.bias)
    torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slots", [{"q": (0, 2), "v": (2, 4)}, {"q": (0, 4)}, {"v": (1, 2)}])
def test_zero_b_changes_no_bit(slots: dict[str, tuple[int, int]]) -> None:
    layer = _layer(5, 4, slots, 3)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_has_the_documented_spread_and_b_is_zero() -> None:
    layer = _layer(400, 8, {"q": (0, 8)}, 50)
    assert layer.q.lora_a.std().item() == pytest.approx(1 / 20, rel=0.02)
    assert abs(layer.q.lora_a.mean().item()) < 2e-3
    assert not layer.q.lora_b.any()


def test_same_seed_same_bytes() -> None:
    first, second = (_layer(8, 8, {"q": (0, 8)}, 2) for _ in range(2))
    assert torch.equal(first.q.lora_a, second.q.lora_a)
    reset_lora(second, torch.Generator().manual_seed(4))
    assert not torch.equal(first.q.lora_a, second.q.lora_a)


@pytest.mark.parametrize("slots", [{"q": (0, 3), "v": (2, 4)}, {"q": (0, 5)}, {"q": (2, 2)}])
def test_slots_that_do_not_fit(slots: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="slot"):
        LoraLinear(nn.Linear(2, 4), slots, 1)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        add_lora(nn.Module(), nn.Module(), rank)
