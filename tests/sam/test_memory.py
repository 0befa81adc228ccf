"""Calculated memory against what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from flap_nvflare.sam.memory import activation_bytes, largest_batch
from flap_nvflare.sam.runtime import Runtime, place
from flap_nvflare.sam.segmenter import Segmenter, build_segmenter


def saved_bytes(model: Segmenter, runtime: Runtime, batch: int) -> int:
    """Bytes of what one forward pass with its loss keeps, without the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so no address comes twice
        return tensor

    loss = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, batch=True)
    image = torch.randn(batch, 3, model.image_size, model.image_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with runtime.autocast():
            logits = model(image)
        loss(logits, torch.zeros(batch, 1, *logits.shape[2:]))
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("size", [96, 160])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("trained", [4, 1])
def test_calculation_is_within_a_tenth(bf16: bool, size: int, keep: bool, trained: int) -> None:
    runtime = Runtime(torch.device("cpu"), bf16=bf16)
    model = build_segmenter("vit_t", size, 2, "flap", 8, 0, lora_blocks=trained)
    place(model, runtime)
    for block in model.image_encoder.blocks:
        block.attn.keep_scores = keep
    kernel = "chunked" if keep else "chunked without scores"
    calculated = activation_bytes("vit_t", size, 2, 2, bf16, kernel=kernel, trained_blocks=trained)
    assert calculated == pytest.approx(saved_bytes(model, runtime, 2), rel=0.1)


def test_checkpointing_and_larger_memory_allow_more_images() -> None:
    def batch(memory: float, checkpointing: bool) -> int:
        return largest_batch(memory, 5e8, "vit_b", 512, 2, True, checkpointing)

    assert 0 == batch(5e8, True) < batch(8e9, False) < batch(8e9, True) < batch(16e9, True)
