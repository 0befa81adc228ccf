"""Packed weights give the plain layer's numbers, and never those of an older weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flap_nvflare.sam.lora import LoraLinear
from flap_nvflare.sam.packed import FrozenLinear, pack


def layers() -> tuple[nn.Linear, FrozenLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5).requires_grad_(False)
    return plain, FrozenLinear(plain)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 4, 6)])
def test_value_and_gradient_are_the_plain_layers(shape: tuple[int, ...]) -> None:
    results = []
    for layer in layers():
        x = torch.linspace(-1, 1, 6).expand(shape).clone().requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])


def test_a_changed_weight_is_packed_again() -> None:
    plain, packed = layers()
    x = torch.ones(2, 6)
    before = packed(x)
    with torch.no_grad():
        plain.weight.mul_(2.0)
    assert not torch.equal(packed(x), before)
    torch.testing.assert_close(packed(x), plain(x))


def test_a_layer_that_trains_is_refused() -> None:
    plain, packed = layers()
    plain.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="pack after freezing"):
        packed(torch.ones(1, 6))


def test_scoring_first_does_not_disturb_training() -> None:
    _, packed = layers()
    with torch.inference_mode():
        packed(torch.ones(2, 6))
    packed(torch.ones(2, 6, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("trains", [False, True])
def test_only_frozen_layers_are_packed(trains: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 4).requires_grad_(trains)
    model = nn.Sequential(LoraLinear(base, {"q": (0, 2), "v": (2, 4)}, 2), nn.Linear(4, 3))
    model[1].requires_grad_(trains)
    for parameter in (model[0].q, model[0].v):
        parameter.reset(torch.Generator().manual_seed(1))
        nn.init.normal_(parameter.lora_b)
    names = list(model.state_dict())
    x = torch.randn(3, 6)
    before = model(x)
    pack(model)
    assert list(model.state_dict()) == names
    assert (model[0].packed is not None) is (not trains)
    assert isinstance(model[1], FrozenLinear) is (not trains)
    torch.testing.assert_close(model(x), before)
