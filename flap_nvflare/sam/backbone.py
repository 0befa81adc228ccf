"""SAM's three modules at any image size, from segment_anything's own classes.

`vit_b`, `vit_l` and `vit_h` are the published models (Kirillov et al., "Segment Anything",
arXiv 2304.02643, appendix A); `vit_t` is the small model of the demo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from flap_nvflare.sam import official


@dataclass(frozen=True)
class Architecture:
    """Sizes of a SAM.

    Attributes:
        name: the name it is asked for by.
        embed_dim, depth, heads: of the image encoder's transformer.
        global_blocks: indexes of the encoder blocks that attend over the whole grid.
        window: side, in patches, of the window of all other blocks.
        patch: side of a patch in pixels; a power of two.
        dim: width of the prompt encoder, the mask decoder and the image embedding.
        decoder_heads, decoder_mlp: of the decoder's two-way transformer (two layers).
        iou_hidden: hidden width of the IoU head.
        native_size: image side of the published weights, in pixels.
    """

    name: str
    embed_dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    patch: int = 16
    dim: int = 256
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    iou_hidden: int = 256
    native_size: int = 1024

    def grid(self, image_size: int) -> int:
        """Side of the grid of image tokens.

        Raises:
            ValueError: if the image size is no multiple of the patch size.
        """
        if image_size < self.patch or image_size % self.patch:
            raise ValueError(
                f"image_size: {image_size!r} does not fit {self.name}; "
                f"take a multiple of its patch size {self.patch}"
            )
        return image_size // self.patch


ARCHITECTURES: dict[str, Architecture] = {
    "vit_t": Architecture(
        name="vit_t",
        embed_dim=128,
        depth=4,
        heads=4,
        global_blocks=(1, 3),
        window=6,
        patch=8,
        dim=128,
        decoder_mlp=256,
        iou_hidden=64,
        native_size=96,
    ),
    "vit_b": Architecture("vit_b", 768, 12, 12, (2, 5, 8, 11)),
    "vit_l": Architecture("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": Architecture("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
}


def architecture(arch: str | Architecture) -> Architecture:
    """The named architecture; an `Architecture` of one's own passes through.

    Raises:
        ValueError: on an unknown name.
    """
    if isinstance(arch, Architecture):
        return arch
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: {arch!r} is unknown; expected one of {tuple(ARCHITECTURES)}")
    return ARCHITECTURES[arch]


def build_image_encoder(arch: Architecture, image_size: int) -> Any:
    """SAM's encoder: (N, 3, S, S) -> (N, dim, grid, grid)."""
    arch.grid(image_size)
    return official.modelling().ImageEncoderViT(
        img_size=image_size,
        patch_size=arch.patch,
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.heads,
        out_chans=arch.dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=arch.window,
        global_attn_indexes=arch.global_blocks,
    )


def build_prompt_encoder(arch: Architecture, image_size: int) -> Any:
    """SAM's prompt encoder; without prompts it gives the learned no-mask embedding."""
    grid = arch.grid(image_size)
    return official.modelling().PromptEncoder(
        embed_dim=arch.dim,
        image_embedding_size=(grid, grid),
        input_image_size=(image_size, image_size),
        mask_in_chans=16,
    )


def build_mask_decoder(arch: Architecture, masks: int) -> Any:
    """SAM's stock mask decoder with `masks` mask tokens (published models: 4)."""
    modelling = official.modelling()
    transformer = modelling.TwoWayTransformer(
        depth=2,
        embedding_dim=arch.dim,
        mlp_dim=arch.decoder_mlp,
        num_heads=arch.decoder_heads,
    )
    return modelling.MaskDecoder(
        num_multimask_outputs=masks - 1,
        transformer=transformer,
        transformer_dim=arch.dim,
        iou_head_depth=3,
        iou_head_hidden_dim=arch.iou_hidden,
    )


class StockSam(nn.Module):
    """The published model's three modules under their official names (no image statistics)."""

    def __init__(self, arch: str | Architecture, image_size: int | None = None) -> None:
        super().__init__()
        arch = architecture(arch)
        image_size = image_size or arch.native_size
        self.image_encoder = build_image_encoder(arch, image_size)
        self.prompt_encoder = build_prompt_encoder(arch, image_size)
        self.mask_decoder = build_mask_decoder(arch, masks=4)


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Fills every parameter and buffer of `module` from `generator`, in the order of the modules.

    Weights and biases of linear and convolution layers are uniform in +-1/sqrt(fan-in),
    embeddings and the random Fourier matrix normal, position tables normal with std 0.02,
    normalisation layers the identity.
    """
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False)) | dict(part.named_buffers(recurse=False))
        for name, tensor in own.items():
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                bound = 1 / math.sqrt(_fan_in(part))
                tensor.uniform_(-bound, bound, generator=generator)
            elif isinstance(part, nn.Embedding) or "gaussian_matrix" in name:
                tensor.normal_(generator=generator)
            elif "pos" in name:
                tensor.normal_(std=0.02, generator=generator)
            else:
                tensor.fill_(1.0 if name == "weight" else 0.0)


def _fan_in(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.ConvTranspose2d):  # SAM's have kernel = stride: one tap an output
        return layer.in_channels
    return layer.in_channels * math.prod(layer.kernel_size)
