"""Number formats: a flat float32 vector as a few small parts, and back.

The integer formats are symmetric and blockwise: the numbers of a block share one scale, which
travels as bfloat16. It has float32's range, so that no scale overflows or vanishes, and 8 bits
of mantissa, so that a scale times a code is exact in float32: both ends compute equal bytes.

Blocks hold 128 numbers. As measured on real updates, of 64 a message is up to a tenth longer for
little less error; of 256 the error of `sign` grows by 5%, as layers of unlike sizes meet in one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from flap_nvflare.adapter.container import CodecError

BLOCK = 128
# Largest magnitude that is coded: a scale, rounded up, times its code is still a float32.
LARGEST = 2.0**126
# Below this a bfloat16 is zero; a scale may be too small by no more.
_TINY = 2.0**-133

Parts = Mapping[str, Tensor]
Layout = dict[str, tuple[torch.dtype, int]]


class Format(ABC):
    """One way to write numbers. Vectors are float32 of one dimension, finite, up to `LARGEST`."""

    @abstractmethod
    def layout(self, count: int) -> Layout:
        """Dtype and length of every part of `count` numbers."""

    @abstractmethod
    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """The parts of `values` (n,)."""

    @abstractmethod
    def decode(self, parts: Parts, count: int) -> Tensor:
        """The numbers (count,) of parts that have the layout.

        Raises:
            CodecError: if a code is none that `encode` writes.
        """

    @abstractmethod
    def bound(self, values: Tensor) -> Tensor:
        """Largest |x - decode(encode(x))| of each of `values` (n,); float64."""


class Plain(Format):
    """float32 as it is."""

    def layout(self, count: int) -> Layout:
        return {"codes": (torch.float32, count)}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        return {"codes": values}

    def decode(self, parts: Parts, count: int) -> Tensor:
        return parts["codes"]

    def bound(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values, dtype=torch.float64)


class Half(Format):
    """float16, all numbers divided by one power of two u, so that the largest lies near 2^15.

    |x - y| <= 2^-11 |x| + 2^-25 u + 2^-149, with u <= max|x| 2^-14, or 2^-126 if that is more.
    """

    def layout(self, count: int) -> Layout:
        return {"codes": (torch.float16, count), "scales": (torch.float32, 1)}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        unit = self._unit(values)
        return {"codes": (values / unit).half(), "scales": torch.tensor([unit])}

    def decode(self, parts: Parts, count: int) -> Tensor:
        unit = parts["scales"]
        if not bool((unit.isfinite() & (unit > 0)).all()):
            raise CodecError("scales: expected one positive number")
        return parts["codes"].float() * unit

    def bound(self, values: Tensor) -> Tensor:
        slack = 2.0**-25 * self._unit(values) + 2.0**-149
        return values.double().abs() * 2.0**-11 + slack

    @staticmethod
    def _unit(values: Tensor) -> float:
        largest = float(values.abs().max()) if values.numel() else 0.0
        return max(2.0**-126, math.ldexp(1.0, math.frexp(largest)[1] - 15))


class Blockwise(Format):
    """Codes with one bfloat16 scale a block."""

    bits: ClassVar[int]

    def layout(self, count: int) -> Layout:
        codes = (torch.int8, count) if self.bits == 8 else (torch.uint8, _bytes(count, self.bits))
        return {"codes": codes, "scales": (torch.bfloat16, -(-count // BLOCK))}

    def decode(self, parts: Parts, count: int) -> Tensor:
        scales = parts["scales"].float()
        if not bool((scales.isfinite() & ~scales.signbit()).all()):
            raise CodecError("scales: expected finite numbers, not below zero")
        codes = self._codes(parts["codes"], count).float()
        return (_blocks(codes) * scales[:, None]).reshape(-1)[:count]

    @abstractmethod
    def _codes(self, packed: Tensor, count: int) -> Tensor:
        """The whole numbers (count,) that a scale multiplies."""


class Integer(Blockwise):
    """Whole numbers from -L to L times the block's scale s, rounded to the nearest, ties to even.

    s is max|x| / L of the block, rounded up to a bfloat16: no code is ever cut off.
    |x - y| <= s / 2 + L 2^-133, with s <= (1 + 2^-7) max|x| / L.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits  # type: ignore[misc]
        self.levels = 2 ** (bits - 1) - 1

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        blocks = _blocks(values)
        scales = self._scales(blocks)
        divisor = torch.where(scales > 0, scales, torch.ones(())).double()
        codes = (blocks.double() / divisor[:, None]).round().clamp(-self.levels, self.levels)
        codes = codes.reshape(-1)[: values.numel()].to(torch.int8)
        packed = codes if self.bits == 8 else _pack((codes + 8).to(torch.uint8), 4)
        return {"codes": packed, "scales": scales.bfloat16()}

    def bound(self, values: Tensor) -> Tensor:
        half = self._scales(_blocks(values)).double() / 2 + self.levels * _TINY
        return half.repeat_interleave(BLOCK)[: values.numel()]

    def _codes(self, packed: Tensor, count: int) -> Tensor:
        codes = packed if self.bits == 8 else _unpack(packed, 4, count).to(torch.int8) - 8
        if bool((codes < -self.levels).any()):
            raise CodecError(f"codes: one is below -{self.levels}")
        return codes

    def _scales(self, blocks: Tensor) -> Tensor:
        """As float32 that a bfloat16 holds exactly."""
        wanted = (blocks.abs().amax(1).double() / self.levels).float()
        # A bfloat16 is the upper half of a float32: adding to the lower half rounds up.
        return ((wanted.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


class Sign(Blockwise):
    """The sign alone, times the mean magnitude s of the block, rounded down to a bfloat16.

    |x - y| <= max|x| of the block, as 0 <= s <= max|x|. After `top_k` the magnitudes of a block
    are much alike and little is lost; alone, error feedback makes up for it.
    """

    bits = 1

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        sums = _blocks(values).double().abs().sum(1)
        counts = (values.numel() - torch.arange(len(sums)) * BLOCK).clamp(max=BLOCK)
        # The lower half of the float32 set to zero rounds down.
        scales = ((sums / counts).float().view(torch.int32) & ~0xFFFF).view(torch.float32)
        return {"codes": _pack((values >= 0).to(torch.uint8), 1), "scales": scales.bfloat16()}

    def bound(self, values: Tensor) -> Tensor:
        largest = _blocks(values).double().abs().amax(1)
        return largest.repeat_interleave(BLOCK)[: values.numel()]

    def _codes(self, packed: Tensor, count: int) -> Tensor:
        return _unpack(packed, 1, count).to(torch.int8) * 2 - 1


FORMATS: Mapping[str, Format] = {
    "fp32": Plain(),
    "fp16": Half(),
    "int8": Integer(8),
    "int4": Integer(4),
    "sign": Sign(),
}


def _blocks(values: Tensor) -> Tensor:
    """(n,) as (blocks, BLOCK), the last one filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _shifts(bits: int) -> Tensor:
    return torch.arange(8 - bits, -1, -bits, dtype=torch.uint8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, the first in the highest bits of a byte; rest of the last byte zero."""
    each = 8 // bits
    rows = torch.nn.functional.pad(codes, (0, -codes.numel() % each)).view(-1, each)
    return (rows << _shifts(bits)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    codes = ((packed[:, None] >> _shifts(bits)) & (2**bits - 1)).reshape(-1)
    if bool(codes[count:].any()):
        raise CodecError("codes: the rest of the last byte is not zero")
    return codes[:count]
