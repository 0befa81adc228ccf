"""How the network is run: on which device and in which precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers.inferer import Inferer


class AutocastInferer(Inferer):
    """Runs the network, in bf16 where `precision` says so; the result is always float32.

    Args:
        precision: `fp32`, `bf16`, or `auto` (bf16 where the device computes in it).
        device: where the network lives.
    """

    def __init__(self, precision: str, device: torch.device | str) -> None:
        self.device_type = torch.device(device).type
        self.bf16 = precision == "bf16" or (precision == "auto" and computes_bf16(device))

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Logits (N, C+1, S, S) float32 of images (N, 3, S, S)."""
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = network(inputs, *args, **kwargs)
        return logits.float()


def computes_bf16(device: torch.device | str) -> bool:
    """Whether the device multiplies matrices in bf16 instead of only storing it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, test, bool)()) for test in tests)


def choose_device(wish: str) -> torch.device:
    """The device of a site's settings; `auto` is the first GPU where there is one."""
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wish)
