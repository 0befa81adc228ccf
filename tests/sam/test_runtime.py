"""What is chosen for the hardware, and that no choice changes the numbers beyond rounding."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flap_nvflare.sam import runtime as module
from flap_nvflare.sam.backbone import Architecture
from flap_nvflare.sam.memory import activation_bytes
from flap_nvflare.sam.runtime import Runtime, choose, compiled, lower_frozen, place, step_bytes
from flap_nvflare.sam.segmenter import Segmenter, build_segmenter

CPU = torch.device("cpu")


def network(arch: Architecture, method: str = "flap", size: int = 64) -> Segmenter:
    return build_segmenter(arch, size, 2, method, 2, seed=0, base="random")


def gradients(model: Segmenter, runtime: Runtime) -> dict[str, torch.Tensor]:
    place(model, runtime)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with runtime.autocast():
        logits = model(image)
    logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_auto_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, tiny: Architecture) -> None:
    for has in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose(network(tiny), CPU, "auto", 4) == Runtime(CPU, bf16=has, packed=True)
        assert choose(network(tiny), CPU, "fp32", 4) == Runtime(CPU, packed=True)


def test_checkpointing_comes_on_where_memory_runs_out(tiny: Architecture) -> None:
    model = network(tiny)
    needed = activation_bytes(tiny, 64, 4, 2, bf16=False)
    assert choose(model, CPU, "fp32", 4, memory_bytes=needed / 0.79).checkpointing is False
    assert choose(model, CPU, "fp32", 4, memory_bytes=needed / 0.81).checkpointing is True
    for wish in ("on", "off"):
        found = choose(model, CPU, "fp32", 4, checkpointing=wish, memory_bytes=0)
        assert found.checkpointing is (wish == "on")


def test_a_wrong_choice_is_named(tiny: Architecture) -> None:
    with pytest.raises(ValueError, match="compile: 'yes' is unknown"):
        choose(network(tiny), CPU, "fp32", 4, compile="yes")


def test_packing_that_cannot_be_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny: Architecture
) -> None:
    monkeypatch.setattr(module, "available", lambda device, bf16: not bf16)
    assert choose(network(tiny), CPU, "bf16", 4).packed is False
    assert choose(network(tiny), CPU, "fp32", 4).packed is True
    assert choose(network(tiny), CPU, "fp32", 4, compile="on").packed is False
    with pytest.raises(ValueError, match="packed: 'on' cannot be met on cpu in bf16"):
        choose(network(tiny), CPU, "bf16", 4, packed="on")


def test_memory_is_counted_for_what_trains(tiny: Architecture) -> None:
    def needed(method: str, blocks: int = 0) -> int:
        model = build_segmenter(tiny, 64, 2, method, 2, seed=0, base="random", lora_blocks=blocks)
        return step_bytes(model, 4, CPU, bf16=False)

    assert needed("partial_decoder") < needed("flap", 1) < needed("flap") < needed("full")


def test_the_choice_is_told_in_words() -> None:
    assert str(Runtime(CPU)) == "cpu, fp32"
    text = str(Runtime(CPU, bf16=True, channels_last=True, checkpointing=True))
    assert text == "cpu, bf16, checkpointing, channels-last"


@pytest.mark.parametrize("option", ["checkpointing", "channels_last", "packed"])
def test_options_leave_every_gradient(tiny: Architecture, option: str) -> None:
    plain = gradients(network(tiny), Runtime(CPU))
    other = gradients(network(tiny), Runtime(CPU, **{option: True}))
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, msg=name)


def test_the_whole_network_can_be_captured_by_the_compiler(
    monkeypatch: pytest.MonkeyPatch, tiny: Architecture
) -> None:
    # Captured and run as it is: generating code for a processor takes minutes.
    capture = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", capture)
    results = []
    for runtime in (Runtime(CPU), Runtime(CPU, compile=True)):
        model = place(network(tiny), runtime)
        logits = compiled(model, runtime)(torch.ones(1, 3, 64, 64))
        logits.square().mean().backward()
        results.append((logits.detach(), model.image_encoder.blocks[0].attn.qkv.q.lora_b.grad))
    torch.testing.assert_close(results[1], results[0])


def test_lowered_weights_are_what_autocast_would_round_them_to(tiny: Architecture) -> None:
    way = Runtime(CPU, bf16=True)
    image = torch.randn(1, 3, 64, 64)
    plain, lowered = network(tiny), network(tiny)
    lower_frozen(lowered)
    with way.autocast():
        assert torch.equal(plain(image), lowered(image))
    kinds = {p.dtype for p in lowered.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    assert lowered.image_encoder.blocks[0].mlp.lin1.weight.dtype == torch.bfloat16
