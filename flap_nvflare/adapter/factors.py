"""The two factors of a low-rank adapter, delta W = B A: their names, ranks and basis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LORA_A = ".lora_a"
LORA_B = ".lora_b"


class Pair(NamedTuple):
    """One adapter: its common stem and the names of A (r, in) and B (out, r)."""

    stem: str
    a: str
    b: str


def pairs(names: Iterable[str]) -> tuple[Pair, ...]:
    """The adapters among `names`, sorted by stem.

    Raises:
        ValueError: if one factor of a pair is missing.
    """
    known = set(names)
    stems = {name.removesuffix(LORA_A) for name in known if name.endswith(LORA_A)}
    stems |= {name.removesuffix(LORA_B) for name in known if name.endswith(LORA_B)}
    found = tuple(Pair(stem, stem + LORA_A, stem + LORA_B) for stem in sorted(stems))
    for pair in found:
        for name in (pair.a, pair.b):
            if name not in known:
                raise ValueError(f"adapter {pair.stem!r} is half: {name!r} is missing")
    return found


def shape_of_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape of a tensor in an adapter of another rank; only factors have one."""
    if name.endswith(LORA_A):
        return (rank, *shape[1:])
    return (*shape[:1], rank) if name.endswith(LORA_B) else shape


def of_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The adapter in another rank: the first `rank` rows of A and columns of B, or zeros added.

    Factors that a rule has cut from products are in the order of their strength, so that the
    first rows are the best of that rank.
    """
    found = {}
    for name, tensor in tensors.items():
        shape = shape_of_rank(name, tuple(tensor.shape), rank)
        if shape != tuple(tensor.shape):
            resized = tensor.new_zeros(shape)
            kept = tuple(slice(min(old, new)) for old, new in zip(tensor.shape, shape, strict=True))
            resized[kept] = tensor[kept]
            tensor = resized
        found[name] = tensor
    return found


def without_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with zeros for factors: what was measured in a basis that has turned since."""
    return {
        name: torch.zeros_like(tensor) if name.endswith((LORA_A, LORA_B)) else tensor
        for name, tensor in tensors.items()
    }
