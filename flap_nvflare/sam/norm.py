"""The normalisation over channels of SAM's neck and up-scaler, on torch's own kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class ChannelNorm(nn.Module):
    """segment_anything's `LayerNorm2d` with its weights, by torch's kernel of the layer norm."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = stock.weight, stock.bias, stock.eps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), normalised over C at every pixel."""
        x = x.permute(0, 2, 3, 1)
        x = functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)
