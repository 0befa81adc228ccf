"""transformers' SAM with PEFT's LoRA, as an outside reference for a training step.

Needs the extra `bench`. The network is ViT-B with the same rank; PEFT adapts the joint projection
`qkv` of the encoder and the decoder's `q_proj` and `v_proj`. Its decoder answers a prompt (a box
around the whole image) with masks at a quarter of the resolution, so its step does less at full
resolution than ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flap_nvflare.bench.steps import CLASSES, RANK, Step, images
from flap_nvflare.sam.runtime import Runtime


def make_step(size: int, batch: int, bf16: bool, device: torch.device) -> Step:
    """A training step of it.

    Raises:
        ImportError: without transformers or peft.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import SamConfig, SamModel

    grid = size // 16
    config = SamConfig(
        vision_config={"image_size": size},
        prompt_encoder_config={"image_size": size, "image_embedding_size": grid},
        mask_decoder_config={"num_multimask_outputs": CLASSES + 1},
    )
    torch.manual_seed(0)
    model = get_peft_model(
        SamModel(config),
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv", "q_proj", "v_proj"]),
    )
    image, label = images(size, batch, device)
    box = torch.tensor([[[0.0, 0.0, size, size]]], device=device).expand(batch, 1, 4)

    def forward(network: nn.Module, x: Tensor) -> Tensor:
        output: Any = network(pixel_values=x, input_boxes=box, multimask_output=True)
        return nn.functional.interpolate(output.pred_masks[:, 0].float(), size=(size, size))

    return Step(model.to(device), Runtime(device, bf16=bf16), lambda: image, label, forward)
