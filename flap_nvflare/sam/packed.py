"""Frozen linear layers with their weights laid out once for oneDNN, on a CPU.

A matrix product first reorders its weight for the processor's vector units, at every call. A
frozen weight can be reordered once, for the forward product x W^T and for the backward product
dy W; that is a tenth to a quarter more of the processor's rate in float32 and a twentieth in
bfloat16, for two more copies of the frozen weights in memory.

The two operators are those that torch's own compiler uses for frozen weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def available(device: torch.device, bf16: bool) -> bool:
    """Whether torch and the processor have the operators for this precision."""
    names = ["_reorder_linear_weight", "_linear_pointwise"]
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if bf16:
        names.append("_is_mkldnn_bf16_supported")
    has = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return has and (not bf16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Packed:
    """A frozen weight (out, in) in both layouts, made anew if the weight has changed."""

    def __init__(self) -> None:
        self._key: Any = None
        self._layouts: tuple[Tensor, Tensor] | None = None

    def of(self, weight: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The layouts for x W^T and for dy W.

        Args:
            weight: the frozen weight.
            rows: rows of x, which the layout is chosen for; it serves any number.
        """
        key = (id(weight), weight._version, weight.dtype)
        if self._layouts is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():
                reorder = torch.ops.mkldnn._reorder_linear_weight
                dense = weight.detach()
                self._layouts = reorder(dense, rows), reorder(dense.t().contiguous(), rows)
            self._key = key
        return self._layouts


def product(x: Tensor, layout: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of x (N, in) and a layout of W; no gradient."""
    result = torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "")
    return cast(Tensor, result)


class FrozenLinear(nn.Linear):
    """Takes over a frozen linear layer of which only the gradient of the input is ever wanted."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias = base.weight, base.bias
        self.packed = Packed()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the weight's precision."""
        if self.weight.requires_grad:
            raise RuntimeError("a packed layer was made to train; pack after freezing")
        rows = x.reshape(-1, x.shape[-1]).to(self.weight.dtype)
        forward, backward = self.packed.of(self.weight, len(rows))
        out = cast(Tensor, _Frozen.apply(rows, forward, backward, self.bias))
        return out.view(*x.shape[:-1], -1)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Tensor, backward: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.layout = backward
        return product(x, forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return product(gradient.contiguous(), ctx.layout, None), None, None, None


def pack(encoder: nn.Module, rows: int = 1024) -> None:
    """Packs the frozen linear layers of the encoder's blocks, in place.

    The base of a low-rank layer is packed inside of it.

    Args:
        encoder: an image encoder.
        rows: tokens in a batch, which the layouts are chosen for; they serve any number.
    """
    from flap_nvflare.sam.lora import LoraLinear

    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear) and not child.weight.requires_grad:
                child.packed = Packed()
                child.packed.of(child.weight, rows)
            elif type(child) is nn.Linear and not child.weight.requires_grad:
                frozen = FrozenLinear(child)
                frozen.packed.of(child.weight, rows)
                setattr(module, name, frozen)
