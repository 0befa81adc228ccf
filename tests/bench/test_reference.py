"""The straightforward network computes what ours does, in every output and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flap_nvflare.bench.reference import SlicedLora, build_ours, straightforward
from flap_nvflare.sam import official
from flap_nvflare.sam.runtime import Runtime, place


@pytest.mark.parametrize("method", ["flap", "lora_decoder", "full"])
@pytest.mark.parametrize("size", [96, 80])  # whole windows, and padded ones
def test_straightforward_network_is_ours(method: str, size: int) -> None:
    ours = build_ours("vit_t", size, 2, method, 4)
    other = straightforward(ours, "vit_t", method, 4)
    place(ours, Runtime(torch.device("cpu"), packed=True))
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    results = []
    for network in (ours, other):
        out = network(image)
        out.square().mean().backward()
        grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        results.append((out.detach(), grads))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    largest = max(float(gradient.abs().max()) for gradient in results[1][1].values())
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(
            results[0][1][name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name
        )


def test_straightforward_network_is_of_stock_parts() -> None:
    other = straightforward(build_ours("vit_t", 96, 2, "flap", 4), "vit_t", "flap", 4)
    stock: type[nn.Module] = official.submodule("image_encoder").Attention
    assert sum(isinstance(module, stock) for module in other.modules()) == 4
    assert sum(isinstance(module, SlicedLora) for module in other.modules()) == 4 + 14
