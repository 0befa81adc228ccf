"""The change of the frozen base: absolute, in every precision and layout, and undone to the bit."""

from __future__ import annotations

import pytest
import torch

from flap_nvflare.sam.lora import LoraLinear
from flap_nvflare.sam.packed import available
from flap_nvflare.sam.runtime import Runtime, place
from flap_nvflare.sam.segmenter import Segmenter, build_segmenter

CPU = torch.device("cpu")
STEM = "image_encoder.blocks.0.attn.qkv.v"
Offset = dict[str, torch.Tensor]


def network(**changes: object) -> Segmenter:
    values = {"method": "flap", "lora_blocks": 0, **changes}
    return build_segmenter("vit_t", 48, 2, rank=2, seed=0, base="random", **values)  # type: ignore[arg-type]


def offset_for(model: Segmenter, seed: int = 0, scale: float = 0.05) -> Offset:
    """A change of rank 3 under every adapter."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        for slot, (first, last) in module.slots.items() if isinstance(module, LoraLinear) else ():
            stem = f"{name}.{slot}"
            found[f"{stem}.offset_a"] = torch.randn(3, module.in_features, generator=generator)
            b = torch.randn(last - first, 3, generator=generator)
            found[f"{stem}.offset_b"] = scale * b
    return found


def merged(model: Segmenter, offset: Offset) -> Segmenter:
    """The same change put into the weights before anything else was done with them."""
    with torch.no_grad():
        for name, module in model.named_modules():
            for slot, (first, last) in (
                module.slots.items() if isinstance(module, LoraLinear) else ()
            ):
                stem = f"{name}.{slot}"
                product = offset[f"{stem}.offset_b"] @ offset[f"{stem}.offset_a"]
                module.weight[first:last] += product
    return model


def image() -> torch.Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_one_slot_by_hand() -> None:
    model = network()
    layer = model.image_encoder.blocks[0].attn.qkv
    before = layer.weight.clone()
    width = layer.in_features
    b, a = torch.zeros(width, 1), torch.zeros(1, width)
    b[4], a[0, 7] = 2.0, 3.0
    model.set_offset({f"{STEM}.offset_b": b, f"{STEM}.offset_a": a})
    before[2 * width + 4, 7] += 6.0
    assert torch.equal(layer.weight, before)
    assert sorted(model.offset) == [f"{STEM}.offset_a", f"{STEM}.offset_b"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_offset_is_the_merged_base(bf16: bool, packed: bool) -> None:
    if packed and not available(CPU, bf16):
        pytest.skip("this processor has no such operators")
    runtime = Runtime(CPU, bf16=bf16, packed=packed)
    offset = offset_for(network())
    model = network()
    model.keep_base()
    place(model, runtime)
    expected = place(merged(network(), offset), runtime)
    with runtime.autocast(), torch.no_grad():
        plain = model(image())
        model.set_offset(offset)
        changed = model(image())
        torch.testing.assert_close(changed, expected(image()), rtol=0, atol=0)
        assert not torch.allclose(changed, plain, rtol=1e-2, atol=1e-2)
        model.set_offset({})
        assert torch.equal(model(image()), plain)
    for name, tensor in place(network(), runtime).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_an_offset_replaces_the_one_before_and_spares_slots_it_does_not_name() -> None:
    first, second = offset_for(network(), 1), offset_for(network(), 2)
    one = {name: tensor for name, tensor in second.items() if name.startswith(STEM)}
    model, other = network(), network()
    model.set_offset(first)
    model.set_offset(one)
    other.set_offset(one)
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert sorted(model.offset) == sorted(one)


def test_training_sees_the_changed_base() -> None:
    """The packed layout of the backward pass is made anew as well."""
    if not available(CPU, False):
        pytest.skip("this processor has no such operators")
    offset = offset_for(network())
    gradients = []
    for packed in (True, False):
        model = place(network(), Runtime(CPU, packed=packed))
        model(image()).sum().backward()  # the first layouts are of the base as loaded
        model.zero_grad()
        model.set_offset(offset)
        model(image()).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-2)


def test_frozen_blocks_before_the_first_adapter_stay() -> None:
    model = network(lora_blocks=1)
    before = model.prefix(image())
    assert model.frozen_blocks > 0
    model.set_offset(offset_for(model))
    assert torch.equal(model.prefix(image()), before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({f"{STEM}.offset_b": None}, "is half"),
        ({f"{STEM}.offset_a": torch.zeros(3, 7)}, r"A is \(3, 7\)"),
        ({f"{STEM}.offset_a": torch.zeros(4, 64)}, "expected"),
        ({"other.offset_a": torch.zeros(1, 1), "other.offset_b": torch.zeros(1, 1)}, "no such"),
    ],
)
def test_an_offset_that_does_not_fit_changes_nothing(
    changes: dict[str, torch.Tensor | None], match: str
) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad = {n: t for n, t in {**offset_for(model), **changes}.items() if t is not None}
    with pytest.raises(ValueError, match=match):
        model.set_offset(bad)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert model.offset == {}


def test_weights_that_train_take_no_offset() -> None:
    model = network(method="lora_decoder")
    with pytest.raises(ValueError, match="train themselves"):
        model.set_offset(offset_for(model))
