"""The output layers: one mask token, one hyper-network and one logit map for every class.

SAM's decoder answers one prompt with four masks at a quarter of the resolution. Here the mask
tokens stand for background and the C foreground classes, and the up-scaler (UP) goes on to the
full resolution of the input (arXiv 2407.21739; sizes checked against its table 1). A class's
logits are the inner product of its hyper-network's (HYP) output with the up-scaled features.

What SAM's weights fit keeps SAM's names: the first transposed convolution, its normalisation and
the second transposed convolution. Everything else here starts fresh.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from flap_nvflare.sam import official
from flap_nvflare.sam.backbone import Architecture, build_mask_decoder, initialise
from flap_nvflare.sam.norm import ChannelNorm

# Weights of the class decoder that no checkpoint gives. 0, 1 and 3 of the up-scaler are SAM's.
FRESH = re.compile(
    r"(output_upscaling\.(?![013]\.)\d+|output_hypernetworks_mlps|mask_tokens"
    r"|iou_prediction_head\.layers\.2)\."
)


def build_upscaler(arch: Architecture) -> nn.Sequential:
    """UP: log2(patch) transposed convolutions of kernel 2 and stride 2, (N, d, g, g) -> full size.

    Channels run d, d/4, d/8, d/16, ...; LayerNorm2d and GELU stand between the stages, GELU at
    the end.
    """
    norm = official.submodule("common").LayerNorm2d
    stages = arch.patch.bit_length() - 1
    widths = [arch.dim, *(arch.dim // 2 ** (k + 2) for k in range(stages))]
    layers: list[nn.Module] = []
    for k in range(stages):
        layers.append(nn.ConvTranspose2d(widths[k], widths[k + 1], kernel_size=2, stride=2))
        if k < stages - 1:
            layers.append(ChannelNorm(norm(widths[k + 1])))
        layers.append(nn.GELU())
    return nn.Sequential(*layers)


def build_class_decoder(arch: Architecture, classes: int) -> Any:
    """SAM's mask decoder with C+1 mask tokens, UP to full resolution and C+1 HYP.

    Args:
        arch: sizes of the SAM.
        classes: foreground classes, C.
    """
    if classes < 1:
        raise ValueError(f"classes: {classes!r}; at least one foreground class is needed")
    decoder = build_mask_decoder(arch, masks=classes + 1)
    mlp = official.submodule("mask_decoder").MLP
    width = arch.dim // 2 ** (arch.patch.bit_length())
    decoder.output_upscaling = build_upscaler(arch)
    decoder.output_hypernetworks_mlps = nn.ModuleList(
        mlp(arch.dim, arch.dim, width, 3) for _ in range(classes + 1)
    )
    return decoder


def reset_head(decoder: nn.Module, generator: torch.Generator) -> None:
    """Draws the fresh layers of a class decoder; the layers that SAM gives stay as they are."""
    for name, module in sorted(decoder.named_modules()):
        if FRESH.match(f"{name}.") and not any(module.children()):
            initialise(module, generator)
