"""One direction between two ends that both hold the last global adapter, the reference.

Up: each site has a `Sender` and the server receives. The site's next difference is to another
reference, so what coding lost would be gone; with `feedback` the sender keeps it and adds it to
its next difference: sum of what was sent + residue = sum of what was asked.

Down: the server has one `Sender` for all sites. Its reference is what the sites hold, which is
`Sent.held` of the last round and not the adapter that it meant to send. So the next difference
holds by itself what was lost, and no residue is kept (`parse(..., "down")` refuses `feedback`).

A receiver without the reference (the first round; a site that missed one) needs the adapter
whole: encode with reference None. Such a message is without loss and taken at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flap_nvflare.adapter.codec import Shapes, decode, encode
from flap_nvflare.adapter.container import CodecError, read_header
from flap_nvflare.adapter.stages import Pipeline
from flap_nvflare.adapter.update import content_sha256

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """An adapter that both ends hold, bit for bit.

    Attributes:
        tensors: float32 tensors by name.
        sha256: their `content_sha256`, by which messages name it.
    """

    tensors: Mapping[str, Tensor]
    sha256: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Reference:
        """The reference that `tensors` are; later changes to them do not change it."""
        kept = {name: tensors[name].detach().cpu().clone() for name in sorted(tensors)}
        return cls(kept, content_sha256(kept))


class Sent(NamedTuple):
    """A message, and what its receiver will hold: equal, bit for bit, to `receive(blob, ...)`."""

    blob: bytes
    held: Tensors


class Sender:
    """The sending end. Its state is the residue of error feedback; without it there is none.

    `encode` counts its message as delivered. If it never was, restore the state from before.

    Args:
        pipeline: what is done to an update.
        shapes: shape of every tensor by name.
    """

    def __init__(self, pipeline: Pipeline, shapes: Shapes) -> None:
        self.pipeline = pipeline
        self._shapes = {name: tuple(shapes[name]) for name in sorted(shapes)}
        self._residue = self._zeros() if pipeline.feedback else {}

    def encode(self, tensors: Mapping[str, Tensor], reference: Reference | None) -> Sent:
        """The message of an update.

        Args:
            tensors: what the receiver should hold, float32.
            reference: what it holds already, for `difference`; None sends the update whole.

        Raises:
            CodecError: if names or shapes are others, or a number can't be coded. The state is
                then as it was.
        """
        _same_shapes(tensors, self._shapes, "the update")
        wanted = {name: tensors[name].detach().cpu() for name in self._shapes}
        pipeline, sha256 = self.pipeline.whole, ""
        if self.pipeline.difference and reference is not None:
            _same_shapes(reference.tensors, self._shapes, "the reference")
            pipeline, sha256 = self.pipeline, reference.sha256
            wanted = {name: wanted[name] - reference.tensors[name] for name in wanted}
        if self._residue:
            wanted = {name: wanted[name] + self._residue[name] for name in wanted}
        blob = encode(wanted, pipeline, sha256)
        coded = decode(blob, self._shapes, pipeline, sha256)
        if self._residue:
            self._residue = {name: wanted[name] - coded[name] for name in wanted}
        return Sent(blob, _add(coded, reference if sha256 else None))

    def state(self) -> Tensors:
        """The residue by name, for a checkpoint; empty without `feedback`."""
        return {name: tensor.clone() for name, tensor in self._residue.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave.

        Raises:
            CodecError: if it is the state of another sender.
        """
        _same_shapes(state, self._shapes if self.pipeline.feedback else {}, "the state")
        for name, tensor in state.items():
            if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
                raise CodecError(f"the state of {name!r} holds no finite float32 numbers")
        self._residue = {name: state[name].detach().cpu().clone() for name in sorted(state)}

    def reset(self, names: Iterable[str]) -> None:
        """Forgets what was lost of tensors whose basis was turned: it lies in the old one.

        Raises:
            CodecError: if there is no tensor of a name.
        """
        for name in names:
            if name not in self._shapes:
                raise CodecError(f"reset: there is no tensor {name!r}")
            if name in self._residue:
                self._residue[name] = torch.zeros(self._shapes[name])

    def _zeros(self) -> Tensors:
        return {name: torch.zeros(shape) for name, shape in self._shapes.items()}


def receive(
    blob: bytes, pipeline: Pipeline, shapes: Shapes, reference: Reference | None = None
) -> Tensors:
    """What the sender's update is at this end; for messages of any peer.

    Args:
        blob: the message.
        pipeline: the stages agreed on.
        shapes: shape of every tensor by name, as the receiver's own spec has them.
        reference: the adapter this end holds; None if it holds none.

    Raises:
        CodecError: if the message is damaged, not of these names and shapes, went through other
            stages, or is a difference to another reference.
    """
    if not pipeline.difference or read_header(blob).stages == pipeline.whole.texts:
        return decode(blob, shapes, pipeline.whole)
    if reference is None:
        raise CodecError(
            "the message is a difference and this end holds no adapter yet; ask for it whole"
        )
    _same_shapes(reference.tensors, shapes, "the reference")
    result = _add(decode(blob, shapes, pipeline, reference.sha256), reference)
    for name, tensor in result.items():
        if not bool(tensor.isfinite().all()):
            raise CodecError(f"{name!r} with its difference holds a number that is not finite")
    return result


def _add(coded: Tensors, reference: Reference | None) -> Tensors:
    if reference is None:
        return coded
    return {name: reference.tensors[name] + coded[name] for name in coded}


def _same_shapes(tensors: Mapping[str, Tensor], shapes: Shapes, what: str) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise CodecError(
                f"{what}: {name!r} has shape {found.get(name)}, expected {wanted.get(name)}"
            )
