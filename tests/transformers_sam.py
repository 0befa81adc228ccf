"""transformers' SAM with the weights of ours or of segment_anything's, by its names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flap_nvflare.sam.backbone import Architecture

# segment_anything's name: transformers' name.
_NAMES = (
    (r"image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"image_encoder\.", "vision_encoder."),
    (r"prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"(.*)\.transformer\.layers\.(\d)\.norm(\d)\.", r"\1.transformer.layers.\2.layer_norm\3."),
    (r"(.*)\.norm_final_attn\.", r"\1.layer_norm_final_attn."),
    (r"mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"(.*(mlps\.\d|head))\.layers\.0\.", r"\1.proj_in."),
    (r"(.*(mlps\.\d|head))\.layers\.1\.", r"\1.layers.0."),
    (r"(.*(mlps\.\d|head))\.layers\.2\.", r"\1.proj_out."),
)
_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def renamed(name: str) -> str:
    """transformers' name of a weight of segment_anything."""
    for pattern, other in _NAMES:
        name, count = re.subn(f"^{pattern}", other, name)
        if count:
            break
    return name


def transformers_sam(arch: Architecture, image_size: int, state: Mapping[str, Tensor]) -> Any:
    """A `SamModel` with the weights of `state`, under segment_anything's names.

    Its decoder's layer norms get segment_anything's epsilon: transformers' default is 1e-6.
    """
    from transformers import SamConfig, SamModel

    width, grid = arch.dim, arch.grid(image_size)
    config = SamConfig(
        vision_config={
            "hidden_size": arch.embed_dim,
            "output_channels": width,
            "num_hidden_layers": arch.depth,
            "num_attention_heads": arch.heads,
            "image_size": image_size,
            "patch_size": arch.patch,
            "window_size": arch.window,
            "global_attn_indexes": list(arch.global_blocks),
            "num_pos_feats": width // 2,
            "mlp_dim": 4 * arch.embed_dim,
        },
        prompt_encoder_config={
            "hidden_size": width,
            "image_size": image_size,
            "patch_size": arch.patch,
            "image_embedding_size": grid,
        },
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": arch.decoder_mlp,
            "num_attention_heads": arch.decoder_heads,
            "iou_head_hidden_dim": arch.iou_hidden,
            "layer_norm_eps": 1e-5,
        },
    )
    with torch.device("meta"):  # no numbers are drawn only to be replaced
        model = SamModel(config).eval()
    given = {renamed(name): tensor for name, tensor in state.items() if name != _POSITIONS}
    for name in ("shared_image_embedding", "prompt_encoder.shared_embedding"):
        given[f"{name}.positional_embedding"] = state[_POSITIONS].clone()
    model.load_state_dict(given, assign=True)
    return model.requires_grad_(False)
