"""The bytes of a coded update: a safetensors file of named parts, deflated if asked.

Its header lists the names of the tensors that the message holds numbers of, so that a gate can
read them without knowing the network. What a peer sent is opened with a bound on every size.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_KEY = "flap_message"
_DTYPES = frozenset({"F32", "F16", "BF16", "I8", "U8"})
_LENGTH_BYTES = 8
# More names than any network of this kind has; a header is read before the network is known.
MAX_HEADER = 1 << 20
_REFERENCE = re.compile(r"(?:[0-9a-f]{64})?")


class CodecError(ValueError):
    """An update can't be coded, or a peer's message is not what it should be."""


@dataclass(frozen=True)
class Header:
    """What a message says of itself.

    Attributes:
        names: tensors that it holds numbers of, sorted.
        reference: `content_sha256` of the adapter that it is a difference to; empty if none.
        stages: the stages it went through, as `stages.parse` reads them.
    """

    names: tuple[str, ...]
    reference: str
    stages: tuple[str, ...]

    def __post_init__(self) -> None:
        for key in ("names", "stages"):
            texts = getattr(self, key)
            if type(texts) is not tuple or any(type(text) is not str for text in texts):
                raise CodecError(f"header: {key} are no list of texts")
        if any(a >= b for a, b in zip(self.names, self.names[1:], strict=False)):
            raise CodecError("header: the names are not in order, or one is there twice")
        if type(self.reference) is not str or not _REFERENCE.fullmatch(self.reference):
            raise CodecError("header: the reference is no SHA-256")

    def to_text(self) -> str:
        """One line of JSON."""
        values = [list(self.names), self.reference, list(self.stages)]
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Header:
        """Reads `to_text`.

        Raises:
            CodecError: if it is none.
        """
        values = _json(text)
        if type(values) is not list or len(values) != 3 or type(values[0]) is not list:
            raise CodecError("header: expected names, reference and stages")
        names, reference, stages = values
        if type(stages) is not list:
            raise CodecError("header: stages are no list")
        return cls(tuple(names), reference, tuple(stages))


def pack(parts: Mapping[str, Tensor], header: Header, deflate: bool) -> bytes:
    """The message; equal content gives equal bytes with one version of zlib."""
    plain = save(dict(parts), {_KEY: header.to_text()})
    if not deflate:
        return plain
    # FILTERED takes only long repeats, as in names: short ones are chance in codes, and cost
    # more than they save. Every part begins a block, so that its bytes get a code of their own.
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_FILTERED)
    packed, start = [], 0
    for end in _ends(plain):
        packed += [packer.compress(plain[start:end]), packer.flush(zlib.Z_BLOCK)]
        start = end
    return b"".join([*packed, packer.flush()])


def unpack(blob: bytes, deflate: bool, most: int) -> tuple[dict[str, Tensor], Header]:
    """The parts of a peer's message, each of one dimension, and its header.

    Args:
        blob: what the peer sent.
        deflate: whether it should be deflated.
        most: bytes it may have after inflating.

    Raises:
        CodecError: if it is damaged, too large, or no such message.
    """
    if _is_deflated(blob) != deflate:
        raise CodecError(f"the message is {'not ' if deflate else ''}deflated; compare the stages")
    plain = _inflate(blob, most) if deflate else blob
    if len(plain) > most:
        raise CodecError(f"the message has {len(plain)} bytes, at most {most} are expected")
    length = _header_length(plain)
    header, entries = _read(plain[_LENGTH_BYTES : _LENGTH_BYTES + length])
    if not all(_is_vector(entry, most) for entry in entries.values()):
        raise CodecError("the message holds a part of another kind")
    try:
        parts = load(plain)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CodecError(f"no whole safetensors message: {str(error)[:200]}") from error
    return parts, header


def read_header(blob: bytes) -> Header:
    """What a message says of itself; inflates no more than the header.

    Raises:
        CodecError: if it has no right header.
    """
    if not _is_deflated(blob):
        length = _header_length(blob)
        return _read(blob[_LENGTH_BYTES : _LENGTH_BYTES + length])[0]
    opener = zlib.decompressobj()
    try:
        # A part of the message: zlib copies what it is given and does not use yet.
        start = opener.decompress(memoryview(blob)[: 2 * MAX_HEADER], _LENGTH_BYTES)
        wanted = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES or wanted > MAX_HEADER:
            raise CodecError(f"the header would have {wanted} bytes, at most {MAX_HEADER}")
        text = opener.decompress(opener.unconsumed_tail, wanted) if wanted else b""
    except zlib.error as error:
        raise CodecError(f"the message can't be inflated: {error}") from error
    if len(text) < wanted:
        raise CodecError("the message ends within its header")
    return _read(text)[0]


def names(blob: bytes) -> list[str]:
    """Names of the tensors that a message holds numbers of, for a gate that allows only some.

    A receiver reads the same list, and counts no number of a tensor that is not in it.

    Raises:
        CodecError: if the message has no right header.
    """
    return list(read_header(blob).names)


def _is_vector(entry: Any, most: int) -> bool:
    """Whether a part's entry is of one dimension and a known dtype, so that it can be loaded."""
    if type(entry) is not dict or type(entry.get("dtype")) is not str:
        return False
    shape = entry.get("shape")
    if type(shape) is not list or len(shape) != 1 or type(shape[0]) is not int:
        return False
    return entry["dtype"] in _DTYPES and 0 <= shape[0] <= most


def _is_deflated(blob: bytes) -> bool:
    if type(blob) is not bytes:
        raise CodecError(f"a message is bytes, not {type(blob).__name__[:80]}")
    # A safetensors file begins with a length of 8 bytes, far below 2^32; zlib's first block
    # can't have four zero bytes there, which would be a code without symbols.
    return blob[:1] == b"\x78" and blob[4:8] != bytes(4)


def _inflate(blob: bytes, most: int) -> bytes:
    if len(blob) > most + most // 8 + 1024:  # deflating makes nothing longer than that
        raise CodecError(f"the message has {len(blob)} bytes, at most {most} are expected")
    opener = zlib.decompressobj()
    try:
        plain = opener.decompress(blob, most + 1)
    except zlib.error as error:
        raise CodecError(f"the message can't be inflated: {error}") from error
    if len(plain) > most:
        raise CodecError(f"the message inflates to more than the {most} bytes expected")
    if not opener.eof:
        raise CodecError("the message is cut off")
    if opener.unused_data:
        raise CodecError("there are bytes after the end of the message")
    return plain


def _header_length(plain: bytes) -> int:
    length = int.from_bytes(plain[:_LENGTH_BYTES], "little")
    if len(plain) < _LENGTH_BYTES or length > min(MAX_HEADER, len(plain) - _LENGTH_BYTES):
        raise CodecError("the message is too short for its header, or no message at all")
    return length


def _read(text: bytes) -> tuple[Header, dict[str, Any]]:
    """The header, and the entries of the parts by name."""
    values = _json(text)
    if type(values) is not dict:
        raise CodecError("header: expected a mapping")
    metadata = values.pop("__metadata__", None)
    if type(metadata) is not dict or set(metadata) != {_KEY} or type(metadata[_KEY]) is not str:
        raise CodecError("header: it says not what the message is")
    return Header.from_text(metadata[_KEY]), values


def _json(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"header: no JSON: {str(error)[:80]}") from error


def _ends(plain: bytes) -> list[int]:
    """Where the header and each part end."""
    data = _LENGTH_BYTES + int.from_bytes(plain[:_LENGTH_BYTES], "little")
    entries = json.loads(plain[_LENGTH_BYTES:data])
    entries.pop("__metadata__")
    return sorted({data, *(data + entry["data_offsets"][1] for entry in entries.values())})
