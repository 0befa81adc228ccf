"""The fused attention against segment_anything's own, in value and in every gradient."""

from __future__ import annotations

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flap_nvflare.sam import attention, official
from flap_nvflare.sam.attention import EncoderAttention
from flap_nvflare.sam.encoder import EncoderBlock

# Grid, window: whole windows, one window, padded at both ends, smaller than a window, global.
GRIDS = [(6, 6, 3), (3, 3, 3), (5, 7, 3), (2, 2, 3), (4, 5, 0)]


def stock_block(height: int, width: int, window: int) -> Any:
    """A segment_anything block of 2 heads of 4 with random weights, in float64."""
    torch.manual_seed(0)
    stock = official.submodule("image_encoder")
    block = stock.Block(
        dim=8, num_heads=2, use_rel_pos=True, window_size=window, input_size=(height, width)
    )
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block.double().requires_grad_(False)


def gradients(block: nn.Module, x: Tensor, trains: str) -> tuple[Tensor, dict[str, Tensor]]:
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(trains in name)
    x = x.clone().requires_grad_()
    out = block(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return out.detach(), {"input": x.grad, **found}


@pytest.mark.parametrize(("height", "width", "window"), GRIDS)
@pytest.mark.parametrize(
    ("kernel", "keep", "trains"),
    [
        ("chunked", True, "proj.weight"),
        ("chunked", False, "qkv.weight"),
        ("fused", True, "qkv.weight"),
        ("fused", True, "rel_pos"),
        ("auto", True, ""),
    ],
)
def test_block_is_segment_anythings(
    height: int, width: int, window: int, kernel: str, keep: bool, trains: str
) -> None:
    stock = stock_block(height, width, window)
    ours = EncoderBlock(copy.deepcopy(stock))
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.attn.kernel, ours.attn.keep_scores = kernel, keep
    x = torch.randn(3, height, width, 8, dtype=torch.float64)
    value, grads = gradients(ours, x, trains)
    expected, wanted = gradients(stock, x, trains)
    torch.testing.assert_close(value, expected)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


@pytest.mark.parametrize("chunk", [1, 40, 200, 10**9])
def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(attention, "CHUNK", chunk)
    test_block_is_segment_anythings(5, 7, 3, "chunked", False, "qkv.weight")


def test_trained_tables_are_gathered_anew() -> None:
    block = EncoderBlock(stock_block(4, 4, 0))
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    before = block(x)
    with torch.no_grad():
        block.attn.rel_pos_h.mul_(2.0)
    assert not torch.allclose(block(x), before)


def test_frozen_tables_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block = EncoderBlock(stock_block(4, 4, 0))
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    before = block(x)
    monkeypatch.setattr(attention, "_gather", None)  # would raise if it were called
    assert torch.equal(block(x), before)


def test_tables_gathered_while_scoring_serve_training() -> None:
    block = EncoderBlock(stock_block(4, 4, 0))
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    with torch.inference_mode():
        block(x)
    block(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_auto_leaves_trained_tables_to_the_fused_kernel() -> None:
    layer = EncoderAttention(stock_block(4, 4, 0).attn, 0)
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    assert layer._chunked(x)
    layer.rel_pos_w.requires_grad_()
    assert not layer._chunked(x)


def test_chunked_refuses_what_it_has_no_gradient_for() -> None:
    layer = EncoderAttention(stock_block(4, 4, 0).attn, 0)
    layer.kernel = "chunked"
    layer.qkv.bias.requires_grad_()
    with pytest.raises(ValueError, match="take 'auto'"):
        layer(torch.randn(1, 4, 4, 8, dtype=torch.float64))


def test_torch_2_6_has_no_word_for_exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "is_exporting")
    spec = importlib.util.spec_from_file_location("attention_on_2_6", attention.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look for their module
    spec.loader.exec_module(module)
    assert module.exporting() is False
