"""The channel norm against segment_anything's."""

from __future__ import annotations

import torch

from flap_nvflare.sam import official
from flap_nvflare.sam.norm import ChannelNorm


def test_channel_norm_is_layer_norm_2d() -> None:
    stock = official.submodule("common").LayerNorm2d(6)
    with torch.no_grad():
        stock.weight.normal_()
        stock.bias.normal_()
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(ChannelNorm(stock)(x), stock(x))
