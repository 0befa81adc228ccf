"""What a hostile site may send, for experiments with rules that should withstand it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ATTACKS = ("scale", "flip", "random")


def attacked(
    kind: str, update: Mapping[str, Tensor], start: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """An update as a hostile site changes it; x is the update, x_0 what the site started from.

    Args:
        kind: `scale` sends x_0 + 100 (x - x_0), `flip` sends x_0 - (x - x_0), and `random` sends
            x_0 plus normal noise, in every tensor of ten times the norm of x - x_0.
        update: the site's honest update.
        start: the adapter that it started from, with at least the update's names.
        seed: of the noise.

    Raises:
        ValueError: on an unknown kind.
    """
    if kind not in ATTACKS:
        raise ValueError(f"attack {kind!r} is not known; expected one of {ATTACKS}")
    generator = torch.Generator().manual_seed(seed)
    sent = {}
    for name, tensor in sorted(update.items()):
        change = tensor - start[name]
        if kind == "random":
            noise = torch.randn(tensor.shape, generator=generator)
            change = noise * (10 * change.norm() / noise.norm())
        else:
            change = change * {"scale": 100.0, "flip": -1.0}[kind]
        sent[name] = start[name] + change
    return sent
