"""ViT-B in its full width at 1024 pixels: ours, segment_anything's and transformers' SAM agree.

The gate runs the first three blocks (two in windows, one over the whole grid) with everything
before and after them; all twelve take minutes: pytest -m long tests/sam/test_three_sams.py

No published weights are needed: the encoder has numbers of a real SAM's size (truncated normal of
std 0.02, tables of positions included), so that its activations are of order 1 to 10; prompt
encoder and decoder are as segment_anything draws them. Layer norms and biases are drawn as well,
since at one and zero they would hide a mix-up.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers_sam import transformers_sam

from flap_nvflare.sam import official
from flap_nvflare.sam.backbone import Architecture, architecture
from flap_nvflare.sam.decode import decode
from flap_nvflare.sam.segmenter import build_segmenter

MOST = 1e-4
SIZE = 1024


@torch.no_grad()
def stock_sam(arch: Architecture) -> Any:
    """segment_anything's SAM as its own builder makes it, with the numbers described above."""
    official.modelling()  # enters segment_anything without torchvision
    from segment_anything import build_sam

    torch.manual_seed(0)
    sam = build_sam._build_sam(arch.embed_dim, arch.depth, arch.heads, arch.global_blocks)
    for name, parameter in sam.named_parameters():
        if parameter.ndim > 1:
            if name.startswith("image_encoder."):
                nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith(".weight"):  # of layer norms
            parameter.normal_(1.0, 0.1)
        else:
            parameter.normal_(0.0, 0.02)
    return sam.eval().requires_grad_(False)


def check(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Differences below 1e-4, and below 1e-4 of the largest value where all are small."""
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    print(f"{what}: at most {difference:.1e} apart, values up to {largest:.2g}")
    assert difference < MOST * min(1.0, largest), what


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "blocks",
    [pytest.param(3, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.long)],
)
@torch.no_grad()
def test_vit_b_at_1024_pixels_is_the_same_in_three_codes(blocks: int, tmp_path: Path) -> None:
    arch = architecture("vit_b")
    few = tuple(block for block in arch.global_blocks if block < blocks)
    arch = dataclasses.replace(arch, depth=blocks, global_blocks=few)
    stock = stock_sam(arch)
    state = stock.state_dict()
    save_file(state, tmp_path / "sam.safetensors")
    ours = build_segmenter(arch, SIZE, 2, "flap", 4, 0, tmp_path / "sam.safetensors")
    other = transformers_sam(arch, SIZE, state)
    image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    embedding = stock.image_encoder(image)
    check("encoder, ours and segment_anything's", ours.image_encoder(image), embedding)
    check(
        "encoder, transformers' and segment_anything's", other.vision_encoder(image)[0], embedding
    )

    positions = stock.prompt_encoder.get_dense_pe()
    check("positions, transformers'", other.get_image_wide_positional_embeddings(), positions)
    box = torch.tensor([[100.0, 200.0, 700.0, 900.0]])
    for what, boxes in (("a box", box), ("no prompt", None)):
        sparse, dense = stock.prompt_encoder(None, boxes, None)
        masks, token, _ = decode(stock.mask_decoder, embedding, positions, sparse, dense)
        expected, quality = stock.mask_decoder.predict_masks(embedding, positions, sparse, dense)
        check(f"masks of {what}, ours and segment_anything's", masks, expected)
        check(f"quality of {what}", stock.mask_decoder.iou_prediction_head(token), quality)
        given = (embedding, positions, sparse[:, None], dense)
        several, one = (
            other.mask_decoder(*given, multimask_output=m)[0][:, 0] for m in (True, False)
        )
        check(f"masks of {what}, ours and transformers'", masks, torch.cat([one, several], 1))
