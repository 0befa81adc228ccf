"""How many bytes a message has and may have, known without making a second copy of it.

FLARE serialises tensors by safetensors within msgpack. All that is large has a size that its
metadata tell; only what is left without it is serialised to be counted.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.class_loader import get_class_name
from nvflare.fuel.utils.fobs.datum import TEN_MEGA, DatumRef
from nvflare.fuel.utils.fobs.decomposers.via_downloader import EncKey, EncType
from nvflare.fuel.utils.fobs.fobs import FOBS_DATA, FOBS_DECOMPOSER, FOBS_TYPE
from nvflare.fuel.utils.fobs.lobs import DATUM_ID_LEN, HEADER_LEN

from flap_nvflare.adapter.update import UpdateSpec

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Things in a message: an honest one has some hundreds of them, beside as many tensors.
_MOST_ITEMS = 100_000
_MOST_TEXT = 1 << 20
# Bytes that a message may have beside its tensors, and beside each of them.
_ENVELOPE = 1 << 20
_BESIDE_EACH = 1024


def size_fault(count: int, expected: UpdateSpec, control: bool) -> str:
    """What is wrong with an update of so many bytes; empty if nothing is.

    Args:
        count: bytes of the message.
        expected: of the tensors as they travel.
        control: whether SCAFFOLD's control variates come beside them.
    """
    beside = sum(len(name) + _BESIDE_EACH for name in expected.shapes)
    most = _ENVELOPE + (2 if control else 1) * (expected.bytes + beside)
    return f"the message has {count} bytes, at most {most} are expected" if count > most else ""


def serialised_bytes(message: Any) -> int:
    """Bytes of the message as FLARE serialises it for the wire.

    Exact for every message that this package makes. What a peer has made otherwise, or what can't
    be serialised again, is counted by its parts; nothing that arrives makes this raise.
    """
    count = _Count()
    try:
        small = count.without_bulk(message)
        return len(fobs.dumps(small)) + count.bulk
    except Exception:  # whatever the peer's objects do
        return sum(_parts(message))


class _Count:
    """Takes out of a message what is large, and adds up its bytes."""

    def __init__(self) -> None:
        self.bulk = 0
        self._items = 0

    def without_bulk(self, value: Any) -> Any:
        """A copy whose tensors and bytes are replaced by what is left of them when empty."""
        self._items += 1
        if self._items > _MOST_ITEMS:
            raise ValueError("too many things in a message")
        if type(value) is torch.Tensor:
            return self._tensor(value)
        if type(value) is bytes:
            return self._bytes(len(value))
        if isinstance(value, dict):
            kept = type(value)()
            kept.update({key: self.without_bulk(one) for key, one in value.items()})
            return kept
        if type(value) in (list, tuple):
            return type(value)(self.without_bulk(one) for one in value)
        if type(value) is DXO:
            return DXO(value.data_kind, self.without_bulk(value.data), value.meta)
        if isinstance(value, str) and len(value) > _MOST_TEXT:
            raise ValueError("a text as large as a tensor")
        if not isinstance(value, (str, int, float, type(None))):
            raise ValueError("a thing that no message of this package holds")
        return value

    def _tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        size = tensor.numel() * tensor.element_size()
        dtype, shape = _DTYPES[tensor.dtype], ",".join(map(str, tensor.shape))
        header = f'{{"t":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[0,{size}]}}}}'
        padded = -(-len(header) // 8) * 8
        return {
            FOBS_TYPE: get_class_name(torch.Tensor),
            FOBS_DATA: {EncKey.TYPE: EncType.NATIVE, EncKey.DATA: self._bytes(8 + padded + size)},
            FOBS_DECOMPOSER: get_class_name(TensorDecomposer),
        }

    def _bytes(self, length: int) -> bytes | DatumRef:
        """What stands in msgpack for so many bytes: none, or from a size on a reference to them."""
        self.bulk += length
        if length >= TEN_MEGA:
            self.bulk += HEADER_LEN + DATUM_ID_LEN
            return DatumRef(str(uuid.UUID(int=0)), True)
        # msgpack's length takes 1 byte up to 255, 2 up to 65535, then 4.
        self.bulk += 0 if length < 1 << 8 else 1 if length < 1 << 16 else 3
        return b""


def _parts(value: Any) -> Iterator[int]:
    """Bytes of the parts of anything, without copies and without calling itself."""
    todo: list[Iterator[Any]] = [iter((value,))]
    for _ in range(100 * _MOST_ITEMS):
        one = next(todo[-1], todo)
        if one is todo:
            todo.pop()
            if not todo:
                return
            continue
        if type(one) in (bytes, str):
            yield len(one)
        elif isinstance(one, torch.Tensor):
            yield _tensor_bytes(one)
        elif isinstance(one, np.ndarray):
            yield int(one.nbytes)
        elif isinstance(one, Mapping):
            todo += [iter(one.keys()), iter(one.values())]
        elif isinstance(one, (list, tuple, set, frozenset)):
            todo.append(iter(one))
        elif type(one) is DXO:
            todo.append(iter((one.data, one.meta)))
        else:
            yield 1


def _tensor_bytes(tensor: torch.Tensor) -> int:
    try:
        return tensor.numel() * tensor.element_size()
    except Exception:  # of a kind that has no such size
        return 1
