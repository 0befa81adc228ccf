"""The tensors that travel, what they must look like, and their safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flap_nvflare.adapter.factors import shape_of_rank

_SPEC_KEY = "flap_spec"
_FIELDS = ("method", "rank", "base_sha256", "dtype", "shapes")


class UpdateError(ValueError):
    """A file of an update can't be read or is not what it should be."""


@dataclass(frozen=True)
class UpdateSpec:
    """What an update must look like.

    Attributes:
        method: which parameters train, one of the seven methods.
        rank: rank of every low-rank adapter.
        base_sha256: SHA-256 of the frozen base's file, hexadecimal.
        shapes: shape of every tensor by name, sorted by name.
        dtype: dtype of every tensor, as torch names it.
    """

    method: str
    rank: int
    base_sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, kind in (("method", str), ("base_sha256", str), ("dtype", str), ("rank", int)):
            if type(getattr(self, name)) is not kind:
                raise UpdateError(
                    f"spec: {name} is {repr(getattr(self, name))[:80]}, expected {kind.__name__}"
                )
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise UpdateError(
                f"spec: dtype {self.dtype[:80]!r} is none of torch; for instance float32"
            )
        if self.rank < 0:
            raise UpdateError(f"spec: rank {self.rank} is negative")
        if not isinstance(self.shapes, Mapping):
            raise UpdateError(f"spec: shapes are {type(self.shapes).__name__}, expected a mapping")
        shapes = {}
        for name in sorted(self.shapes, key=str):
            shape = self.shapes[name]
            whole = isinstance(shape, (list, tuple)) and all(
                type(size) is int and size >= 0 for size in shape
            )
            if not isinstance(name, str) or not whole:
                # A peer may have written both: no more of them than a log line holds.
                shown = repr(name)[:80], repr(shape)[:80]
                raise UpdateError(f"spec: shape of {shown[0]} is {shown[1]}, expected sizes")
            shapes[name] = tuple(shape)
        object.__setattr__(self, "shapes", shapes)

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], method: str, rank: int, base_sha256: str
    ) -> UpdateSpec:
        """The spec that `tensors` (of one dtype) meet.

        Raises:
            UpdateError: if there are none or their dtypes differ.
        """
        dtypes = sorted({_dtype_name(tensor) for tensor in tensors.values()})
        if len(dtypes) != 1:
            raise UpdateError(f"an update needs tensors of one dtype, found {dtypes}")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(method, rank, base_sha256, shapes, dtypes[0])

    def part(self, names: Iterable[str], rank: int | None = None) -> UpdateSpec:
        """The spec of some of the tensors, in adapters of the given rank.

        Raises:
            KeyError: if a name is none of the spec's.
        """
        rank = self.rank if rank is None else rank
        shapes = {name: shape_of_rank(name, self.shapes[name], rank) for name in names}
        return replace(self, rank=rank, shapes=shapes)

    @property
    def parameters(self) -> int:
        """Numbers in an update."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def bytes(self) -> int:
        """Bytes of the numbers of an update, without any envelope."""
        return self.parameters * getattr(torch, self.dtype).itemsize

    @property
    def sha256(self) -> str:
        """SHA-256 of the spec itself."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and FLARE hold; `from_dict` reads them back."""
        values = {name: getattr(self, name) for name in _FIELDS}
        values["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        return values

    @classmethod
    def from_dict(cls, values: Any) -> UpdateSpec:
        """Checks names and types.

        Raises:
            UpdateError: if `values` are not exactly a spec's.
        """
        if not isinstance(values, Mapping) or set(values) != set(_FIELDS):
            raise UpdateError(f"spec: expected exactly the fields {_FIELDS}")
        return cls(**values)


def content_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, whatever the order of the mapping."""
    digest = hashlib.sha256()
    for name, tensor in _ready(tensors).items():
        digest.update(json.dumps([name, _dtype_name(tensor), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_update(
    path: Path | str,
    tensors: Mapping[str, torch.Tensor],
    spec: UpdateSpec,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes an update whole or not at all; equal content gives equal bytes.

    Args:
        path: file to write or replace.
        tensors: as `spec` says.
        spec: kept in the file's metadata.
        extra: further texts for the metadata.

    Raises:
        UpdateError: if the tensors do not meet the spec, or a text is none.
        OSError: if the file can't be written.
    """
    path = Path(path)
    for key, value in (extra or {}).items():
        if type(key) is not str or type(value) is not str:
            raise UpdateError(f"{path}: extra {key!r}: {value!r} is no text; use str()")
    _check(path, tensors, spec)
    # safetensors keeps the metadata in no fixed order: one entry, itself sorted, is in order.
    metadata = {
        _SPEC_KEY: json.dumps({"spec": spec.to_dict(), "extra": dict(extra or {})}, sort_keys=True)
    }
    write_atomic(path, save(_ready(tensors), metadata))


def load_update(path: Path | str) -> tuple[dict[str, torch.Tensor], UpdateSpec, dict[str, str]]:
    """The tensors sorted by name, their spec, and the extra texts.

    Raises:
        UpdateError: if the file is no safetensors file, is cut off, or disagrees with its spec.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: the file is only mapped, and another process may cut it off later.
            tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
    except FileNotFoundError as error:
        raise UpdateError(f"{path}: there is no such file; check the path") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UpdateError(
            f"{path}: no whole safetensors file ({error}); fetch or make it again"
        ) from error
    if _SPEC_KEY not in metadata:
        raise UpdateError(
            f"{path}: has no spec in its metadata; name a file written by save_update"
        )
    try:
        header = json.loads(metadata[_SPEC_KEY])
        spec = UpdateSpec.from_dict(header["spec"])
        extra = {str(key): str(value) for key, value in header["extra"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpdateError(
            f"{path}: the spec in its metadata is damaged ({error}); fetch or make it again"
        ) from error
    _check(path, tensors, spec)
    return tensors, spec, extra


def write_atomic(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replaces `path` by `content`, on the disk when this returns; a kill leaves the old file.

    `mode` is the new file's, less what the umask takes away.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check(path: Path, tensors: Mapping[str, torch.Tensor], spec: UpdateSpec) -> None:
    for name in sorted(set(tensors) ^ set(spec.shapes)):
        where = "tensors" if name in tensors else "spec"
        raise UpdateError(f"{path}: {name!r} is only in the {where}; tensors and spec must agree")
    for name, tensor in tensors.items():
        found = (tuple(tensor.shape), _dtype_name(tensor))
        if found != (spec.shapes[name], spec.dtype):
            raise UpdateError(
                f"{path}: {name!r} is {found}, its spec says {(spec.shapes[name], spec.dtype)}; "
                "make the file or the spec again"
            )


def _ready(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense copies on the CPU by sorted name: safetensors refuses tensors that share memory."""
    return {
        name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
