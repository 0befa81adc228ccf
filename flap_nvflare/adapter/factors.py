"""Names of the two factors of a low-rank adapter: delta W = B A."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

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
