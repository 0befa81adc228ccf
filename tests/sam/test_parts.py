"""What trains, travels, stays and is fixed under each kind of rule, by names alone."""

from __future__ import annotations

import pytest

from flap_nvflare.sam import tuning
from flap_nvflare.sam.segmenter import blank_segmenter
from flap_nvflare.sam.tuning import Parts

STEM = "image_encoder.blocks.0.attn.qkv.q"
A, B, CORE = (f"{STEM}.lora_{end}" for end in ("a", "b", "core"))
TOKENS = "mask_decoder.mask_tokens.weight"
BASE = "image_encoder.blocks.0.attn.qkv.weight"
OFFSET = f"{STEM}.offset_a"


def those(holds: object) -> set[str]:
    names = {"A": A, "B": B, "R": CORE, "head": TOKENS, "base": BASE, "offset": OFFSET}
    return {short for short, name in names.items() if holds(name)}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("trains", "trained", "fixed", "even", "odd"),
    [
        ("ab", "A B", "", "A B", "A B"),
        ("b", "B", "A", "B", "B"),
        ("alternate", "A B", "", "B", "A"),
        ("core", "R", "A B", "R", "R"),
    ],
)
def test_parts_by_what_the_rule_trains(
    trains: str, trained: str, fixed: str, even: str, odd: str
) -> None:
    parts = Parts("flap", trains)
    assert those(parts.trained) == {*trained.split(), "head"}
    assert those(parts.fixed) == set(fixed.split())
    assert those(parts.private) == set()
    assert those(parts.down) == {*trained.split(), "head"}
    for index, names in ((0, even), (1, odd), (6, even)):
        assert those(lambda name, t=index: parts.up(name, t)) == {*names.split(), "head"}
        assert those(lambda name, t=index: parts.trained(name, t)) == {*names.split(), "head"}


def test_private_factors_and_a_personal_head_stay() -> None:
    shared_a = Parts("flap", stays="b")
    assert those(shared_a.trained) == {"A", "B", "head"}
    assert those(shared_a.private) == {"B"}
    assert those(shared_a.up) == those(shared_a.down) == {"A", "head"}
    own_head = Parts("flap", personal="head")
    assert those(own_head.private) == {"head"}
    assert those(own_head.up) == those(own_head.down) == {"A", "B"}
    assert those(Parts("flap", personal="ditto").up) == {"A", "B", "head"}


def test_the_offset_comes_down_and_never_goes_up() -> None:
    parts = Parts("flap", offset=True)
    assert those(parts.down) == {"A", "B", "head", "offset"}
    assert those(parts.up) == those(parts.trained) == {"A", "B", "head"}


def test_a_filter_without_a_rule_lets_factors_pass_but_no_offset() -> None:
    assert those(lambda name: tuning.travels("flap", name)) == {"A", "B", "R", "head"}
    assert those(lambda name: tuning.travels("flap", name, offset=True)) == {
        "A", "B", "R", "head", "offset",
    }  # fmt: skip
    assert those(lambda name: tuning.travels("decoder", name, offset=True)) == {"head"}
    for odd in (f"{CORE}.x", f"x.{CORE}", f"{STEM}.lora_cores", f"{STEM}.offset_c", f"{OFFSET}\n"):
        assert not tuning.travels("flap", odd, offset=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "flop"}, "'flop' is unknown"),
        ({"trains": "a"}, "trains: 'a' is unknown"),
        ({"stays": "a"}, "stays: 'a' is unknown"),
        ({"personal": "tail"}, "personal: 'tail' is unknown"),
        ({"method": "decoder", "trains": "core"}, "'decoder' has no adapters"),
        ({"method": "full", "offset": True}, "'full' has no adapters"),
        ({"method": "lora_decoder", "offset": True}, "trains weights under adapters"),
        ({"trains": "b", "stays": "b"}, "nothing would travel"),
        ({"method": "lora", "personal": "head"}, "no head"),
        ({"method": "partial_decoder", "personal": "head"}, "nothing but the head"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Parts(**{"method": "flap", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("trains", sorted(tuning.TRAINED))
def test_names_and_network_agree(trains: str) -> None:
    parts = Parts("flap", trains)
    model = blank_segmenter("vit_t", 96, 2, 4, lora=True, core=trains == "core")
    tuning.freeze(model, parts)
    names = dict(model.named_parameters())
    trained = {name for name, p in names.items() if p.requires_grad}
    assert (
        trained
        == {name for name in names if parts.trained(name)}
        == {*tuning.trainable(model, parts)}
    )
    factors = {name for name in names if ".lora_" in name}
    assert factors - trained == {name for name in names if parts.fixed(name)}
    assert trained & factors
