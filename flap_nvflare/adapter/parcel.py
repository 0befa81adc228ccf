"""What travels in one message: an adapter, and what some rules and optimisers send beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

OFFSET_A, OFFSET_B = ".offset_a", ".offset_b"
CONTROL = "control/"


class Parcel(NamedTuple):
    """The parts of a message.

    Attributes:
        tensors: the adapter's tensors by name.
        offset: the change of the frozen base, `<stem>.offset_b` (out, q) and `<stem>.offset_a`
            (q, in), on the way down.
        control: SCAFFOLD's control variates by the names of the adapter's tensors: the
            federation's on the way down, the change of the site's on the way up.
    """

    tensors: dict[str, Tensor]
    offset: dict[str, Tensor]
    control: dict[str, Tensor]

    def flat(self) -> dict[str, Tensor]:
        """One mapping, for a message; `parcel` takes it apart again."""
        control = {CONTROL + name: tensor for name, tensor in self.control.items()}
        return {**self.tensors, **self.offset, **control}


def parcel(data: Mapping[str, Tensor]) -> Parcel:
    """The parts of a message's data, by their names alone."""
    parts = Parcel({}, {}, {})
    for name, tensor in data.items():
        if name.startswith(CONTROL):
            parts.control[name.removeprefix(CONTROL)] = tensor
        elif name.endswith((OFFSET_A, OFFSET_B)):
            parts.offset[name] = tensor
        else:
            parts.tensors[name] = tensor
    return parts
