"""Merged weights give the numbers of base and adapter, and go through torch's exporters."""

from __future__ import annotations

import pytest
import torch

from flap_nvflare.sam.lora import LoraFactors, LoraLinear
from flap_nvflare.sam.merged import merge, merged_state, plain_segmenter
from flap_nvflare.sam.segmenter import Segmenter, build_segmenter
from flap_nvflare.sam.tuning import Parts

SIZE = 80  # ten tokens a side in windows of six: padded ones as well


def trained(method: str = "flap", **changes: object) -> Segmenter:
    """A network whose adapters and offset change its output."""
    network = build_segmenter("vit_t", SIZE, 2, method, rank=2, seed=0, base="random", **changes)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, part in sorted(network.named_modules()):
            if isinstance(part, LoraFactors):
                for factor in part.parameters():
                    factor.normal_(std=0.1, generator=draw)
    return network.eval()


def offset_of(network: Segmenter) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(6)
    found = {}
    for name, layer in network.named_modules():
        for slot, (first, last) in layer.slots.items() if isinstance(layer, LoraLinear) else ():
            found[f"{name}.{slot}.offset_a"] = torch.randn(2, layer.in_features, generator=draw)
            found[f"{name}.{slot}.offset_b"] = 0.05 * torch.randn(last - first, 2, generator=draw)
    return found


@torch.no_grad()
def logits(network: torch.nn.Module, images: int = 2) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return network(torch.randn(images, 3, SIZE, SIZE, generator=draw))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("flap", {}),
        ("lora_decoder", {"lora_blocks": 2}),
        ("flap", {"parts": Parts("flap", trains="core")}),
        ("decoder", {}),
    ],
)
def test_the_merged_network_gives_the_same_numbers(method: str, changes: dict) -> None:
    network = trained(method, **changes)
    merged = merge(network)
    difference = (logits(merged) - logits(network)).abs().max()
    assert difference < 1e-5
    assert not any(isinstance(part, (LoraFactors, LoraLinear)) for part in merged.modules())
    assert not merged.training
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_every_adapter_and_every_offset_is_in_it() -> None:
    network = trained()
    before = merged_state(network)
    network.set_offset(offset_of(network))
    after = merged_state(network)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    layers = {f"{n}.weight" for n, m in network.named_modules() if isinstance(m, LoraLinear)}
    assert changed == layers
    assert len(layers) == 4 + 2 * 7  # encoder qkv; q and v of seven attentions of the decoder
    plain = plain_segmenter("vit_t", SIZE, 2)
    plain.load_state_dict(after)
    assert (logits(plain) - logits(network)).abs().max() < 1e-5
    bare = plain_segmenter("vit_t", SIZE, 2)
    bare.load_state_dict({k: v for k, v in network.state_dict().items() if ".lora_" not in k})
    assert (logits(bare) - logits(network)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_network_takes_any_number_of_images() -> None:
    merged = merge(trained())
    with torch.no_grad():
        traced = torch.jit.trace(merged, torch.rand(1, 3, SIZE, SIZE), check_trace=False)
    for images in (1, 3):
        torch.testing.assert_close(
            logits(traced, images), logits(merged, images), rtol=1e-5, atol=1e-5
        )


def test_what_is_kept_between_calls_is_not_written_down() -> None:
    merged = merge(trained())
    logits(merged)  # keeps position tables and encodings
    with torch.no_grad():
        traced = torch.jit.trace(merged, torch.rand(1, 3, SIZE, SIZE), check_trace=False)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in merged.state_dict().items()}
    traced.load_state_dict(zeros)
    assert not logits(traced).any()
