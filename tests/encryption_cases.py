"""Small updates, and contexts made by the builder that FLARE provisions with."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from nvflare.lighter.impl.he import HEBuilder

from flap_nvflare.adapter.cipher import COEFFICIENT_BITS, POLY_DEGREE, SCALE_BITS
from flap_nvflare.adapter.update import UpdateSpec

_SLOT = "image_encoder.blocks.0.attn.qkv.q"
SCALE = "mask_decoder.output_upscaling.0.bias"
SHAPES = {
    f"{_SLOT}.lora_a": (8, 300),
    f"{_SLOT}.lora_b": (300, 8),
    "mask_decoder.mask_tokens.weight": (3,),
    SCALE: (),
}

# Settings of a linear rule's job, small.
SMALL = {
    "rounds": 2,
    "image_size": 64,
    "batch_size": 16,
    "foreground_fraction": 1.0,
    "local_epochs": 1,
    "rule": "mean",
    "cross_site": "global",
}


def update(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) / 5 for name, shape in SHAPES.items()}


SPEC = UpdateSpec.of(update(0), "flap", 8, "0" * 64)


def provisioned() -> tuple[bytes, bytes]:
    """A site's context and the server's, as a startup kit has them."""
    builder = HEBuilder(POLY_DEGREE, list(COEFFICIENT_BITS), SCALE_BITS)
    builder.initialize(SimpleNamespace(), SimpleNamespace())
    return builder.get_serialized_context(is_client=True), builder.get_serialized_context()
