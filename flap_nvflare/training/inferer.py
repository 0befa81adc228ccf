"""How the network is called: on which device, and under which precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers.inferer import Inferer

from flap_nvflare.sam.runtime import Runtime
from flap_nvflare.settings import SettingsError


class AutocastInferer(Inferer):
    """Runs the network, in bf16 where the runtime says so; the result is always float32.

    Args:
        runtime: how the network runs on this device.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Logits (N, C+1, S, S) float32 of images (N, 3, S, S)."""
        with self.runtime.autocast():
            logits = network(inputs, *args, **kwargs)
        return logits.float()


def choose_device(wish: str) -> torch.device:
    """The device of a site's settings; `auto` is the first GPU where there is one.

    Raises:
        SettingsError: if torch knows no such device, or this machine has none.
    """
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wish)
    except RuntimeError as error:
        raise SettingsError(
            f"device: {wish!r} is unknown to torch; give cpu, cuda, cuda:1 or auto"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device: {wish!r} is not there, torch finds {torch.cuda.device_count()} GPUs; give "
            "cpu or auto, or see to the driver and CUDA_VISIBLE_DEVICES"
        )
    return device
