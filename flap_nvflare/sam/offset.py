"""A change of the frozen base under the adapters: W becomes W + B' A' in the rows of a slot.

Some rules of aggregation keep what no adapter of the rank can hold, and send it as factors of
their own: `<stem>.offset_b` (out, q) and `<stem>.offset_a` (q, in), where `<stem>.lora_a` is the
adapter of the same slot. The change counts from the base as it was loaded, never from an earlier
change, so that rounding does not add up and a site that missed a round misses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flap_nvflare.sam.lora import LoraLinear

OFFSET_A = ".offset_a"
OFFSET_B = ".offset_b"


class BaseOffset:
    """The frozen rows under a network's adapters, and the change they have now.

    Args:
        model: a network with low-rank layers.

    Attributes:
        tensors: the factors of the present change by name; empty if the base is as loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = {
            f"{name}.{slot}": (layer, rows)
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLinear)
            for slot, rows in layer.slots.items()
        }
        self._base: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}

    def keep(self) -> None:
        """Copies the rows of every slot in float32, before they are kept in fewer bits."""
        for stem in self._slots:
            self._rows(stem)

    def set(self, offset: Mapping[str, Tensor]) -> None:
        """Adds the products of `offset` to the base in place of the present change.

        Weights change in place, which packed copies of them notice.

        Args:
            offset: factors by name; a slot that none names has its base again.

        Raises:
            ValueError: if a factor lacks its partner, belongs to no slot, does not fit it, or the
                weights of the slot train; nothing is changed then.
        """
        stems = {name.removesuffix(OFFSET_A).removesuffix(OFFSET_B) for name in offset}
        for stem in sorted(stems):
            self._check(stem, offset)
        before = {name.removesuffix(OFFSET_A) for name in self.tensors if name.endswith(OFFSET_A)}
        with torch.inference_mode(False), torch.no_grad():
            for stem in sorted(before | stems):
                layer, (first, last) = self._slots[stem]
                rows = self._rows(stem)
                if stem in stems:
                    b, a = (offset[stem + end].to(rows) for end in (OFFSET_B, OFFSET_A))
                    with torch.autocast(rows.device.type, enabled=False):
                        rows = rows + b @ a
                layer.weight[first:last].copy_(rows)
        self.tensors = {name: offset[name].detach().clone() for name in sorted(offset)}

    def _rows(self, stem: str) -> Tensor:
        """The base's rows of a slot in float32, beside the weight; copied the first time."""
        layer, (first, last) = self._slots[stem]
        weight = layer.weight
        kept = self._base.get(stem)
        if kept is None or kept.device != weight.device:
            source = weight[first:last] if kept is None else kept
            kept = source.detach().to(weight.device, torch.float32, copy=True)
            self._base[stem] = kept
        return kept

    def _check(self, stem: str, offset: Mapping[str, Tensor]) -> None:
        if stem not in self._slots:
            raise ValueError(f"offset of {stem!r}: no such adapter in this network")
        for end in (OFFSET_A, OFFSET_B):
            if stem + end not in offset:
                raise ValueError(f"offset of {stem!r} is half: {stem + end!r} is missing")
        layer, (first, last) = self._slots[stem]
        a, b = (tuple(offset[stem + end].shape) for end in (OFFSET_A, OFFSET_B))
        if len(a) != 2 or len(b) != 2 or a != (b[1], layer.in_features) or b[0] != last - first:
            raise ValueError(
                f"offset of {stem!r}: A is {a}, B is {b}; expected (q, {layer.in_features}) and "
                f"({last - first}, q)"
            )
        if a[0] > min(layer.in_features, last - first):
            raise ValueError(
                f"offset of {stem!r}: rank {a[0]} is above {min(layer.in_features, last - first)}, "
                "that of any change of these weights; send fewer directions"
            )
        if layer.weight.requires_grad:
            raise ValueError(
                f"offset of {stem!r}: the weights under it train themselves; take method flap or "
                "lora"
            )
