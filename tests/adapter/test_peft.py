"""The mapping to PEFT's layout and back, by hand; `bundle/test_peft_folder` asks the real PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flap_nvflare.adapter.peft import PeftError, from_peft, halves, to_peft

QKV = "image_encoder.blocks.3.attn.qkv"
PROJECTION = "mask_decoder.transformer.layers.0.self_attn.q_proj"
SLOTS = {
    f"{QKV}.q": (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])),
    f"{QKV}.v": (torch.tensor([[5.0], [6.0]]), torch.tensor([[7.0, 8.0]])),
    f"{PROJECTION}.q": (torch.tensor([[9.0]]), torch.tensor([[10.0, 11.0]])),
}
KEY = "base_model.model.vision_encoder.layers.3.attn.qkv.lora_"
PLAIN = {"peft_type": "LORA", "lora_alpha": 1, "r": 1}


def factors(b: list[list[float]], a: list[list[float]], module: str = "") -> dict[str, Tensor]:
    start = f"base_model.model.{module}.lora_" if module else KEY
    return {f"{start}A.weight": torch.tensor(a), f"{start}B.weight": torch.tensor(b)}


def test_query_and_value_become_blocks_of_one_layer() -> None:
    tensors, config = to_peft(SLOTS)
    assert tensors[f"{KEY}A.weight"].tolist() == [[3.0, 4.0], [7.0, 8.0]]
    assert tensors[f"{KEY}B.weight"].tolist() == [
        [1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 5.0], [0.0, 6.0],
    ]  # fmt: skip
    layer, projection = "vision_encoder.layers.3.attn.qkv", PROJECTION
    assert set(config["target_modules"]) == {layer, projection}
    assert (config["r"], config["lora_alpha"]) == (1, 1)
    assert config["rank_pattern"] == config["alpha_pattern"] == {layer: 2}
    own = halves(from_peft(tensors, config), dict.fromkeys(SLOTS, 1))
    assert own is not None
    for stem, (b, a) in SLOTS.items():
        assert torch.equal(own[stem].b, b)
        assert torch.equal(own[stem].a, a)


def test_blocks_of_other_widths_are_found_and_another_layout_is_not_taken_for_ours() -> None:
    wide = {**SLOTS, f"{QKV}.v": (torch.ones(2, 3), torch.ones(3, 2))}
    read = from_peft(*to_peft(wide))
    own = halves(read, {f"{QKV}.q": 1, f"{QKV}.v": 3, f"{PROJECTION}.q": 1})
    assert own is not None
    assert own[f"{QKV}.v"].b.shape == (2, 3)
    assert halves(read, {f"{QKV}.q": 2, f"{QKV}.v": 2, f"{PROJECTION}.q": 1}) is None
    assert halves(read, {f"{QKV}.q": 1, f"{QKV}.v": 2, f"{PROJECTION}.q": 1}) is None
    assert halves(read, {f"{QKV}.q": 1, f"{QKV}.v": 3}) is None


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6.0),
        ({"alpha_pattern": {"qkv": 4}}, 1.0),
        ({"alpha_pattern": {"kv": 4, "attn.qkv": 8, "qkv": 4}}, 2.0),
        ({"alpha_pattern": {"^qkv": 4}}, 3.0),
    ],
)
def test_the_scale_of_peft_goes_into_b(config: dict[str, object], scale: float) -> None:
    b, a = torch.zeros(3, 4), torch.ones(4, 2)
    b[0] = 1.0
    tensors = {f"{KEY}A.weight": a, f"{KEY}B.weight": b}
    slots = from_peft(tensors, {"peft_type": "LORA", "lora_alpha": 12, **config})
    assert slots[f"{QKV}.q"].b.tolist() == [[scale] * 4]
    assert not slots[f"{QKV}.v"].b.any()


GOOD = factors([[1.0], [0.0], [1.0]], [[1.0, 1.0]])


@pytest.mark.parametrize(
    ("tensors", "config", "match"),
    [
        (factors([[1.0], [0.5], [1.0]], [[1.0]]), {}, r"layers\.3\.attn\.qkv: .*rows of k"),
        (factors([[1.0], [0.0]], [[1.0]]), {}, "no q, k and v"),
        (factors([[1.0]], [[1.0]], "vision_encoder.layers.0.attn.proj"), {}, r"attn\.proj: our"),
        (factors([[1.0]], [[1.0]], "mask_decoder.transformer.x.k_proj"), {}, r"k_proj: our"),
        ({**GOOD, f"{KEY}magnitude_vector": torch.ones(3)}, {}, "magnitude_vector"),
        (factors([[1.0, 1.0]] * 3, [[1.0]]), {}, "do not go together"),
        ({f"{KEY}A.weight": torch.ones(1, 1)}, {}, "do not go together"),
        (factors([[float("nan")]] * 3, [[1.0]]), {}, "finite numbers"),
        (factors([[float("inf")]] * 3, [[1.0]]), {}, "finite numbers"),
        (factors([[1e38]] * 3, [[1.0]]), {}, "finite numbers"),
        (factors([[], [], []], []), {}, "finite numbers"),
        ({}, {}, "empty"),
        (GOOD, {"peft_type": "LOHA"}, "LOHA"),
        (GOOD, {"use_dora": True}, "use_dora"),
        (GOOD, {"bias": "all"}, "bias is 'all'"),
        (GOOD, {"lora_bias": True}, "lora_bias"),
        (GOOD, {"modules_to_save": ["mask_decoder"]}, "modules_to_save"),
        (GOOD, {"init_lora_weights": "pissa"}, "pissa"),
        (GOOD, {"something_new": 1}, "something_new"),
        (GOOD, {"alpha_pattern": {".*qkv": 3}}, "write names of layers"),
        (GOOD, {"alpha_pattern": ["qkv"]}, "no names of layers"),
        (GOOD, {"lora_alpha": None}, "alpha is None"),
        (GOOD, {"lora_alpha": 1e300}, "a number below"),
    ],
)
def test_what_ours_cannot_hold_is_refused(
    tensors: dict[str, Tensor], config: dict[str, object], match: str
) -> None:
    with pytest.raises(PeftError, match=match):
        from_peft(tensors, {**PLAIN, **config})


def test_only_adapters_of_a_sam_go_out() -> None:
    with pytest.raises(PeftError, match="no low-rank adapters"):
        to_peft({})
    with pytest.raises(PeftError, match="is no adapter of a SAM"):
        to_peft({"somewhere.q": SLOTS[f"{QKV}.q"]})
