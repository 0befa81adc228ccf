"""Low-rank adapters: W x + b becomes W x + b + B A x (Hu et al., arXiv 2106.09685), scale 1.

A layer keeps its weights under their own names and gains one pair of factors for every slot it
adapts; a slot is a range of output rows. The encoder's joint `qkv` projection has the slots `q`
and `v`; the decoder's `q_proj` and `v_proj` have one each (arXiv 2407.21739, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flap_nvflare.sam.packed import Packed, product

if TYPE_CHECKING:
    from flap_nvflare.sam.encoder import ImageEncoder


class LoraFactors(nn.Module):
    """The pair of one slot: `lora_a` (r, in) and `lora_b` (out, r)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(rank, inputs))
        self.lora_b = nn.Parameter(torch.empty(outputs, rank))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """A normal with std 1 / sqrt(in), so that A x has x's scale; B zero, so that B A = 0."""
        self.lora_a.normal_(std=1 / math.sqrt(self.lora_a.shape[1]), generator=generator)
        self.lora_b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return functional.linear(functional.linear(x, self.lora_a), self.lora_b)


class LoraLinear(nn.Linear):
    """A linear layer with adapters on some of its output rows.

    Args:
        base: the layer to adapt; its `weight` and `bias` objects are taken over.
        slots: name of every slot and its first and last-plus-one output row; they may not overlap.
        rank: rank of every pair of factors.

    The factors are registered under `<slot>.lora_a` and `<slot>.lora_b` and hold no defined
    values until `reset`.
    """

    def __init__(self, base: nn.Linear, slots: Mapping[str, tuple[int, int]], rank: int) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias = base.weight, base.bias
        self.packed: Packed | None = None
        self.slots = dict(sorted(slots.items(), key=lambda item: item[1]))
        ends = [0]
        for name, (first, last) in self.slots.items():
            if not ends[-1] <= first < last <= self.out_features:
                raise ValueError(
                    f"slot {name!r}: rows {first}..{last} overlap another slot or leave the "
                    f"layer's {self.out_features} rows"
                )
            ends.append(last)
            self.add_module(name, LoraFactors(self.in_features, last - first, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), the base's output plus every slot's product."""
        factors = [self._factors(name) for name in self.slots]
        tensors = [self.weight, self.bias, *(f.lora_a for f in factors)]
        tensors += [f.lora_b for f in factors]
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, *tensors = (None if t is None else t.to(dtype) for t in (x, *tensors))
        weight, bias, *tensors = tensors
        rows = x.reshape(-1, x.shape[-1])
        layouts = None
        if self.packed is not None and weight is self.weight:
            layouts = self.packed.of(weight, len(rows))
        out = _LoraProduct.apply(
            rows,
            weight,
            bias,
            layouts,
            tuple(self.slots.values()),
            torch.cat(tensors[: len(factors)]),
            *tensors[len(factors) :],
        )
        return cast(Tensor, out).view(*x.shape[:-1], -1)

    def _factors(self, slot: str) -> LoraFactors:
        return cast(LoraFactors, self.get_submodule(slot))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight W + B A of a plain linear layer that computes the same, (out, in)."""
        weight = self.weight.clone()
        for name, (first, last) in self.slots.items():
            factors = self._factors(name)
            weight[first:last] += factors.lora_b @ factors.lora_a
        return weight


class _LoraProduct(torch.autograd.Function):
    """y = W x + b, y[slot] += B (A x), with one product for the A of all slots.

    The slots are added where they belong: nothing is cut out or put together again. With
    t = A x and s = B^T dy[slot], the gradients are dx = W^T dy + A^T s, dA = s x^T and
    dB = dy[slot] t^T; W and b have theirs only if they train.

    Args of `apply`: x (N, in), W (out, in), b (out) or None, the layouts of a packed W or None,
    the slots' rows, all A (sum of r, in), then each slot's B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layouts: tuple[Tensor, Tensor] | None,
        slots: tuple[tuple[int, int], ...],
        down: Tensor,
        *ups: Tensor,
    ) -> Tensor:
        if layouts is None:
            out = functional.linear(x, weight, bias)
        else:
            out = product(x, layouts[0], bias)
        low = functional.linear(x, down)
        for (first, last), up, part in zip(slots, ups, _split(low, ups), strict=True):
            out[:, first:last].addmm_(part, up.mT)
        ctx.slots, ctx.layouts = slots, layouts
        ctx.save_for_backward(x, weight, down, low, *ups)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, down, low, *ups = ctx.saved_tensors
        above = [gradient[:, first:last] for first, last in ctx.slots]
        small = torch.cat([g @ up for g, up in zip(above, ups, strict=True)], dim=1)
        wanted = ctx.needs_input_grad
        inner = None
        if wanted[0]:
            inner = (
                gradient @ weight
                if ctx.layouts is None
                else product(gradient, ctx.layouts[1], None)
            )
            inner.addmm_(small, down)
        parts = zip(above, _split(low, ups), strict=True)
        return (
            inner,
            gradient.mT @ x if wanted[1] else None,
            gradient.sum(dim=0) if wanted[2] else None,
            None,
            None,
            small.mT @ x,
            *(g.mT @ part for g, part in parts),
        )


def _split(low: Tensor, ups: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return low.split([up.shape[1] for up in ups], dim=1)


def add_lora(
    image_encoder: ImageEncoder, mask_decoder: nn.Module, rank: int, last_blocks: int = 0
) -> None:
    """Adapts q and v of every attention layer of the encoder and of the decoder, in place.

    Args:
        image_encoder: the encoder.
        mask_decoder: the decoder.
        rank: rank of every pair of factors.
        last_blocks: the encoder's last blocks that are adapted; 0 for all.

    Raises:
        ValueError: if the rank is not positive or there are fewer blocks.
    """
    if rank < 1:
        raise ValueError(f"rank: {rank!r} is no positive number")
    blocks: list[Any] = list(image_encoder.blocks)
    if not 0 <= last_blocks <= len(blocks):
        raise ValueError(
            f"lora_blocks: {last_blocks!r}; the encoder has {len(blocks)} blocks, give 0 for all"
        )
    for block in blocks[len(blocks) - (last_blocks or len(blocks)) :]:
        qkv = block.attn.qkv
        width = qkv.out_features // 3
        block.attn.qkv = LoraLinear(qkv, {"q": (0, width), "v": (2 * width, 3 * width)}, rank)
    for module in mask_decoder.modules():
        for slot in ("q", "v"):
            projection = getattr(module, f"{slot}_proj", None)
            if isinstance(projection, nn.Linear):
                layer = LoraLinear(projection, {slot: (0, projection.out_features)}, rank)
                setattr(module, f"{slot}_proj", layer)


def reset_lora(module: nn.Module, generator: torch.Generator) -> None:
    """Draws every A and zeroes every B of `module`, in the order of the names."""
    for _, part in sorted(module.named_modules()):
        if isinstance(part, LoraFactors):
            part.reset(generator)
