from __future__ import annotations

import pytest
import torch

from flap_nvflare.sam import tuning
from flap_nvflare.sam.backbone import StockSam
from flap_nvflare.sam.segmenter import Segmenter, blank_segmenter, build_segmenter
from flap_nvflare.settings import METHODS

PAPER = {  # parameters at ViT-B, 224 px, two classes, rank 32 (arXiv 2407.21739, table 1)
    "full": 90_532_927,
    "attention": 31_681_152,
    "decoder": 3_902_195,
    "partial_decoder": 478_320,
    "lora": 1_368_064,
    "lora_decoder": 5_270_259,
    "flap": 1_846_384,
}


@pytest.fixture(scope="module")
def blank() -> Segmenter:
    return blank_segmenter("vit_t", 96, 2, 8, lora=True)


def test_counts_are_the_papers() -> None:
    rows = tuning.count("vit_b", 224, 2, 32)
    assert {row.method: row.parameters for row in rows} == PAPER
    flap = rows[-1]
    assert flap.bytes == 7_385_536
    assert flap.reduction == pytest.approx(49.03, abs=0.01)


def test_counts_with_one_class() -> None:
    rows = {row.method: row.parameters for row in tuning.count("vit_b", 224, 1, 32)}
    assert (rows["full"], rows["flap"]) == (90_398_774, 1_712_488)


def test_stock_model_has_the_published_size() -> None:
    with torch.device("meta"):
        model = StockSam("vit_b")
    assert sum(p.numel() for p in model.parameters()) == 93_735_472


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_adapters_grow_with_the_rank(rank: int) -> None:
    rows = {row.method: row.parameters for row in tuning.count("vit_b", 224, 2, rank)}
    assert rows["lora"] == 42_752 * rank


def test_methods_are_those_of_the_settings() -> None:
    assert tuple(tuning.METHODS) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_names_alone_agree_with_the_network(blank: Segmenter, method: str) -> None:
    names = list(blank.state_dict())  # buffers as well: none of them travels
    kept = tuning.trainable(blank, method)
    assert list(kept) == sorted(name for name in names if tuning.travels(method, name))
    tuning.freeze(blank, method)
    assert {n for n, p in blank.named_parameters() if p.requires_grad} == set(kept)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_trains_gets_gradients(method: str) -> None:
    model = build_segmenter("vit_t", 48, 2, method, 2, 0, None, "random")
    model(torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = set(tuning.trainable(model, method))
    # The IoU head and the prompt encoder serve prompts; no loss on class masks reaches them.
    idle = ("mask_decoder.iou_prediction_head.", "prompt_encoder.")
    assert moved == {name for name in expected if not name.startswith(idle)}


@pytest.mark.parametrize(
    ("method", "name", "expected"),
    [
        ("flap", "image_encoder.blocks.0.attn.qkv.q.lora_a", True),
        ("flap", "mask_decoder.transformer.layers.0.self_attn.v_proj.v.lora_b", True),
        ("flap", "mask_decoder.mask_tokens.weight", True),
        ("flap", "mask_decoder.iou_token.weight", False),
        ("flap", "image_encoder.blocks.0.attn.qkv.weight", False),
        ("flap", "image_encoder.pos_embed", False),
        ("lora", "mask_decoder.mask_tokens.weight", False),
        ("decoder", "mask_decoder.transformer.layers.0.self_attn.q_proj.q.lora_a", False),
        ("full", "image_encoder.blocks.0.attn.qkv.q.lora_a", False),
        ("attention", "image_encoder.blocks.0.attn.rel_pos_h", True),
        ("attention", "image_encoder.blocks.0.mlp.lin1.weight", False),
        ("flap", "patient_names.lora_a", False),
        ("full", "optimizer.state", False),
        ("flap", "mask_decoder.output_upscaling_backup.weight", False),
        ("flap", "", False),
        ("flap", "image_encoder.patient.lora_a", False),
        ("flap", "image_encoder.blocks.0.attn.qkv.k.lora_a", False),
        ("flap", "mask_decoder.output_upscaling.0.weight.patient", False),
        ("flap", "mask_decoder.mask_tokens.weight\n", False),
        ("attention", "image_encoder.blocks.0.attn.patient", False),
        ("decoder", "mask_decoder.patient", False),
        ("full", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", False),
    ],
)
def test_travels(method: str, name: str, expected: bool) -> None:
    assert tuning.travels(method, name) is expected


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'flop'.*flap"):
        tuning.travels("flop", "mask_decoder.mask_tokens.weight")
