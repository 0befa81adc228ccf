"""An update as one blob of bytes, and back.

All tensors of an update are one flat vector, in order of their names: the largest are chosen
over all of it, and blocks run on from one tensor into the next, so that 73 small tensors cost
no more than one large. A tensor of which nothing is left to send is absent, and zero again at
the receiver.

Bytes of a message: a header of about 60 a name (7 deflated) and, for each number that is kept,
its position (about one byte), its code and 1/64 byte of scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flap_nvflare.adapter import sparse
from flap_nvflare.adapter.container import CodecError, Header, pack, unpack
from flap_nvflare.adapter.number_formats import FORMATS, LARGEST
from flap_nvflare.adapter.stages import Pipeline

Shapes = Mapping[str, Sequence[int]]
# Bytes of a header beside its names.
_HEADER = 4096


def encode(tensors: Mapping[str, Tensor], pipeline: Pipeline, reference: str = "") -> bytes:
    """The message of an update or, with `difference`, of a difference taken already.

    The same tensors give the same bytes, whatever the order of the mapping.

    Args:
        tensors: float32, finite, of magnitudes up to 2^126.
        pipeline: what is done to them.
        reference: `content_sha256` of the adapter that they are a difference to.

    Raises:
        CodecError: if a tensor can't be coded, or `difference` has no reference.
    """
    if bool(reference) != pipeline.difference:
        raise CodecError(
            f"stages {list(pipeline.texts)} with reference {reference!r}: a difference, and only "
            "a difference, names its reference"
        )
    values, kept, sent = _select(tensors, pipeline)
    parts = FORMATS[pipeline.number].encode(values[kept])
    if pipeline.top_k is not None:
        parts["positions"] = sparse.gaps(kept[_within(sent, _sizes(tensors))])
    return pack(parts, Header(sent, reference, pipeline.texts), pipeline.deflate)


def decode(
    blob: bytes, shapes: Shapes, pipeline: Pipeline, reference: str = ""
) -> dict[str, Tensor]:
    """What `encode` was given, but for what its stages lose; for messages of any peer.

    Takes memory for a small multiple of what `shapes` say, whatever the message says.

    Args:
        blob: the message.
        shapes: shape of every tensor by name, as the receiver's own spec has them.
        pipeline: the stages agreed on.
        reference: what the message must be a difference to; empty without `difference`.

    Returns:
        Finite float32 tensors of all `shapes`, sorted by name.

    Raises:
        CodecError: if the message is not one that `encode` makes of such tensors.
    """
    parts, header = unpack(blob, pipeline.deflate, _most(shapes))
    _check(header, shapes, pipeline, reference)
    sizes = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    within = _within(header.names, sizes)
    places = within.nonzero().view(-1)
    if pipeline.top_k is not None:
        written = parts.pop("positions", None)
        if written is None or written.dtype != torch.uint8:
            raise CodecError("the message has no positions")
        most = pipeline.kept(len(within))
        places = places[sparse.positions(written, len(places), most)]
    values = torch.zeros(len(within))
    values[places] = _numbers(parts, len(places), pipeline.number)
    pieces = values.split(list(sizes.values()))
    return {
        name: piece.view(tuple(shapes[name])).clone()
        for name, piece in zip(sizes, pieces, strict=True)
    }


def bound(tensors: Mapping[str, Tensor], pipeline: Pipeline) -> dict[str, Tensor]:
    """Largest |x - decode(encode(x))| of every number; float64 tensors of the same shapes.

    A number that `top_k` drops is off by its own magnitude, at most the least that is kept; for
    one that is kept see its format in `number_formats`.

    Raises:
        CodecError: if a tensor can't be coded.
    """
    values, kept, _ = _select(tensors, pipeline)
    bounds = values.double().abs()
    bounds[kept] = FORMATS[pipeline.number].bound(values[kept])
    sizes = _sizes(tensors)
    pieces = bounds.split(list(sizes.values()))
    return {n: piece.view(tensors[n].shape) for n, piece in zip(sizes, pieces, strict=True)}


def _select(
    tensors: Mapping[str, Tensor], pipeline: Pipeline
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """All numbers (n,), the mask (n,) of those that are sent, and the names these belong to."""
    sizes = _sizes(tensors)
    for name in sizes:
        tensor = tensors[name]
        if tensor.dtype != torch.float32:
            raise CodecError(f"{name!r} is {tensor.dtype}; only float32 is coded: use .float()")
        if tensor.numel() and not float(tensor.detach().abs().max()) <= LARGEST:
            raise CodecError(f"{name!r} holds a number that is not finite or above {LARGEST:g}")
    flat = [tensors[name].detach().cpu().reshape(-1) for name in sizes]
    values = torch.cat([torch.zeros(0), *flat])
    if not pipeline.difference:
        return values, torch.ones(len(values), dtype=torch.bool), tuple(sizes)
    mask = values != 0
    if pipeline.top_k is not None:
        mask = sparse.largest(values, pipeline.kept(len(values)))
    masks = zip(sizes, mask.split(list(sizes.values())), strict=True)
    sent = tuple(name for name, piece in masks if bool(piece.any()))
    return values, mask if pipeline.top_k is not None else _within(sent, sizes), sent


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensors[name].numel() for name in sorted(tensors)}


def _within(names: Sequence[str], sizes: Mapping[str, int]) -> Tensor:
    """Mask (n,) of the numbers of `names` among those of all tensors."""
    among = frozenset(names)
    flags = torch.tensor([name in among for name in sizes], dtype=torch.bool)
    return flags.repeat_interleave(torch.tensor(list(sizes.values()), dtype=torch.int64))


def _most(shapes: Shapes) -> int:
    """Bytes that a message may have before it is deflated.

    A name is JSON within JSON; a number takes up to 4 bytes, its position and scale the rest.
    """
    names = sum(len(json.dumps(json.dumps(name))) for name in shapes)
    return _HEADER + names + 6 * sum(math.prod(shape) for shape in shapes.values())


def _check(header: Header, shapes: Shapes, pipeline: Pipeline, reference: str) -> None:
    if header.stages != pipeline.texts:
        raise CodecError(
            f"the message went through {_short(header.stages)}, expected {list(pipeline.texts)}; "
            "both ends must have the same list of stages"
        )
    if header.reference != reference:
        raise CodecError(
            f"the message is a difference to {header.reference[:12] or 'nothing'}, expected one "
            f"to {reference[:12] or 'nothing'}; send it whole to a receiver without this reference"
        )
    if extra := [name for name in header.names if name not in shapes]:
        raise CodecError(f"unexpected name {_short(extra[0])}: it may not travel")
    if not pipeline.difference and len(header.names) < len(shapes):
        missing = min(set(shapes) - set(header.names))
        raise CodecError(f"the message lacks {missing!r}; only a difference may leave names out")


def _numbers(parts: Mapping[str, Tensor], count: int, number: str) -> Tensor:
    """The finite numbers (count,) of a peer's parts."""
    layout = FORMATS[number].layout(count)
    found = {name: (part.dtype, part.numel()) for name, part in parts.items()}
    if found != layout:
        raise CodecError(
            f"the message's parts are {_short(found)}, expected {layout} for {count} numbers"
        )
    values = FORMATS[number].decode(parts, count)
    if not bool(values.isfinite().all()):
        raise CodecError("the message holds a number that is not finite")
    return values


def _short(value: object) -> str:
    return repr(value)[:200]
