"""SAM's image encoder on the attention of `attention`: the same weights, names and numbers.

The encoder can be run in two parts, the first k blocks and the rest. Where nothing trains in the
first part its result is the same at every step, and can be computed once and kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flap_nvflare.sam.attention import EncoderAttention
from flap_nvflare.sam.norm import ChannelNorm


class EncoderBlock(nn.Module):
    """A transformer block that takes over the weights of segment_anything's `Block`."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.norm1 = stock.norm1
        self.attn = EncoderAttention(stock.attn, stock.window_size)
        self.norm2, self.mlp = stock.norm2, stock.mlp

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        x = x + self.attn(self.norm1(x))
        return x + cast(Tensor, self.mlp(self.norm2(x)))


class ImageEncoder(nn.Module):
    """Takes over the weights of segment_anything's `ImageEncoderViT` under their own names.

    Attributes:
        checkpointing: whether every block's activations are made again for the backward pass
            instead of being kept.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed = stock.patch_embed, stock.pos_embed
        self.blocks = nn.ModuleList(EncoderBlock(block) for block in stock.blocks)
        self.neck = nn.Sequential(*(ChannelNorm(p) if hasattr(p, "eps") else p for p in stock.neck))
        self.checkpointing = False

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, dim, grid, grid)."""
        return self.rest(self.prefix(image, 0), 0)

    def prefix(self, image: Tensor, blocks: int) -> Tensor:
        """The tokens (N, grid, grid, C) after the first `blocks` blocks."""
        x = self.patch_embed(image) + self.pos_embed
        return self._run(x, self.blocks[:blocks])

    def rest(self, tokens: Tensor, blocks: int) -> Tensor:
        """What `forward` gives, from the result of `prefix`."""
        x = self._run(tokens, self.blocks[blocks:])
        return cast(Tensor, self.neck(x.permute(0, 3, 1, 2)))

    def _run(self, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x
