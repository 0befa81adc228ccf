"""The straightforward network that ours is measured against.

segment_anything's own encoder, attention and layer norms, and low-rank products added to slices
of the joint projection: what one writes first. Its parameters carry the same names, so both
networks can hold the same weights.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_nvflare.sam import tuning
from flap_nvflare.sam.backbone import architecture, build_image_encoder
from flap_nvflare.sam.lora import LoraLinear
from flap_nvflare.sam.segmenter import Segmenter, build_segmenter


class SlicedLora(LoraLinear):
    """The same layer, each slot's product added to its slice of the output."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = functional.linear(x, self.weight, self.bias)
        for name, (first, last) in self.slots.items():
            out[..., first:last] += self.get_submodule(name)(x)
        return out


def build_ours(arch: str, image_size: int, classes: int, method: str, rank: int) -> Segmenter:
    """Our network with random weights, on the CPU.

    B of every adapter is drawn as well: at zero, half of an adapter's gradient would vanish.
    """
    ours = build_segmenter(arch, image_size, classes, method, rank, seed=0, base="random")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(ours.named_parameters()):
            if name.endswith("lora_b"):
                parameter.normal_(std=0.01, generator=generator)
    return ours


def straightforward(ours: Segmenter, arch: str, method: str, rank: int) -> Segmenter:
    """The straightforward network with a copy of the weights of `ours`."""
    other = build_segmenter(
        arch, ours.image_size, ours.classes, method, rank, seed=0, base="random"
    )
    other.add_module("image_encoder", _stock_encoder(arch, ours.image_size, rank, method))
    for module in list(other.modules()):
        for name, child in list(module.named_children()):
            if type(child) is LoraLinear:
                setattr(module, name, _sliced(child, rank))
    other.load_state_dict(ours.state_dict())
    tuning.freeze(other, method)
    return other


def _stock_encoder(arch: str, image_size: int, rank: int, method: str) -> nn.Module:
    encoder = cast(nn.Module, build_image_encoder(architecture(arch), image_size))
    if tuning.method_named(method).lora:
        for block in encoder.blocks:  # type: ignore[union-attr]
            qkv = block.attn.qkv
            width = qkv.out_features // 3
            block.attn.qkv = SlicedLora(qkv, {"q": (0, width), "v": (2 * width, 3 * width)}, rank)
    return encoder


def _sliced(layer: LoraLinear, rank: int) -> SlicedLora:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    return SlicedLora(plain, layer.slots, rank)
