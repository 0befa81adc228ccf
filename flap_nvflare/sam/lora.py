"""Low-rank adapters: W x + b becomes W x + b + B A x (Hu et al., arXiv 2106.09685), scale 1.

A layer keeps its weights under their own names and gains one pair of factors for every slot it
adapts; a slot is a range of output rows. The encoder's joint `qkv` projection has the slots `q`
and `v`; the decoder's `q_proj` and `v_proj` have one each (arXiv 2407.21739, section 2).

With a core the product is B R A, of which only R (r, r) trains (Fed-SB, arXiv 2502.15436). Fed-SB
takes A and B from an SVD of first gradients; here they are drawn, with columns of B and rows of A
that are nearly orthonormal, so that no data decide them.
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
    """The pair of one slot: `lora_a` (r, in) and `lora_b` (out, r), and perhaps their core.

    Args:
        inputs: columns of A.
        outputs: rows of B.
        rank: the rank r.
        core: whether there is a `lora_core` (r, r) between them.
    """

    lora_core: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, rank: int, core: bool = False) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(rank, inputs))
        self.lora_b = nn.Parameter(torch.empty(outputs, rank))
        self.lora_core = nn.Parameter(torch.empty(rank, rank)) if core else None

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draws the factors; the product is zero.

        A is normal with std 1 / sqrt(in), so that A x has x's scale. B is zero; with a core it is
        normal with std 1 / sqrt(out), so that B^T B is near the unit matrix, and the core is zero.
        """
        self.lora_a.normal_(std=1 / math.sqrt(self.lora_a.shape[1]), generator=generator)
        if self.lora_core is None:
            self.lora_b.zero_()
            return
        self.lora_b.normal_(std=1 / math.sqrt(self.lora_b.shape[0]), generator=generator)
        self.lora_core.zero_()

    def up(self) -> Tensor:
        """What follows A: B, or B R, (out, r)."""
        return self.lora_b if self.lora_core is None else self.lora_b @ self.lora_core

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return functional.linear(functional.linear(x, self.lora_a), self.up())


class LoraLinear(nn.Linear):
    """A linear layer with adapters on some of its output rows.

    Args:
        base: the layer to adapt; its `weight` and `bias` objects are taken over.
        slots: name of every slot and its first and last-plus-one output row; they may not overlap.
        rank: rank of every pair of factors.
        core: whether every pair has a core.

    The factors are registered under `<slot>.lora_a` and `<slot>.lora_b` and hold no defined
    values until `reset`.
    """

    def __init__(
        self,
        base: nn.Linear,
        slots: Mapping[str, tuple[int, int]],
        rank: int,
        core: bool = False,
    ) -> None:
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
            self.add_module(name, LoraFactors(self.in_features, last - first, rank, core))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), the base's output plus every slot's product."""
        factors = [self._factors(name) for name in self.slots]
        tensors = [self.weight, self.bias, *(f.lora_a for f in factors)]
        tensors += [f.up() for f in factors]
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
            weight[first:last] += factors.up() @ factors.lora_a
        return weight


class _LoraProduct(torch.autograd.Function):
    """y = W x + b, y[slot] += B (A x), with one product for the A of all slots.

    The slots are added where they belong: nothing is cut out or put together again. With
    t = A x and s = B^T dy[slot], the gradients are dx = W^T dy + A^T s, dA = s x^T and
    dB = dy[slot] t^T; each of W, b, A and B has its own only if it trains.

    Args of `apply`: x (N, in), W (out, in), b (out) or None, the layouts of a packed W or None,
    the slots' rows, all A (sum of r, in), then each slot's B (or B R).
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
        # Only the gradients of W and A need x: where both are frozen it is not kept.
        kept = x if ctx.needs_input_grad[1] or ctx.needs_input_grad[5] else None
        ctx.save_for_backward(kept, weight, down, low, *ups)
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
        parts = zip(above, _split(low, ups), wanted[6:], strict=True)
        return (
            inner,
            gradient.mT @ x if wanted[1] else None,
            gradient.sum(dim=0) if wanted[2] else None,
            None,
            None,
            small.mT @ x if wanted[5] else None,
            *(g.mT @ part if trains else None for g, part, trains in parts),
        )


def _split(low: Tensor, ups: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return low.split([up.shape[1] for up in ups], dim=1)


def add_lora(
    image_encoder: ImageEncoder,
    mask_decoder: nn.Module,
    rank: int,
    last_blocks: int = 0,
    core: bool = False,
) -> None:
    """Adapts q and v of every attention layer of the encoder and of the decoder, in place.

    Args:
        image_encoder: the encoder.
        mask_decoder: the decoder.
        rank: rank of every pair of factors.
        last_blocks: the encoder's last blocks that are adapted; 0 for all.
        core: whether every pair has a core, see `LoraFactors`.

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
        rows = {"q": (0, width), "v": (2 * width, 3 * width)}
        block.attn.qkv = LoraLinear(qkv, rows, rank, core)
    for module in mask_decoder.modules():
        for slot in ("q", "v"):
            projection = getattr(module, f"{slot}_proj", None)
            if isinstance(projection, nn.Linear):
                layer = LoraLinear(projection, {slot: (0, projection.out_features)}, rank, core)
                setattr(module, f"{slot}_proj", layer)


def reset_lora(module: nn.Module, generator: torch.Generator) -> None:
    """Draws every pair of factors of `module`, in the order of the names; products are zero."""
    for _, part in sorted(module.named_modules()):
        if isinstance(part, LoraFactors):
            part.reset(generator)
