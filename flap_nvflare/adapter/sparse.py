"""Which numbers travel: the largest of an update, and their positions as bytes.

The largest are chosen over the whole update, not tensor by tensor: in the third round of real
training that takes a third off the error at equal bytes, since few layers still move much.
Error feedback lets a slow layer's change grow until it is among the largest.

A position travels as its gap to the one before: one byte below 255, or 255 and more bytes. The
gaps are then small numbers with few different values, which deflate writes within 3% of their
entropy. A bit for every position would take a fifth more at a share of 0.05, and as much at 0.15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flap_nvflare.adapter.container import CodecError

_MORE = 255


def largest(values: Tensor, count: int) -> Tensor:
    """Mask (n,) of the `count` largest magnitudes of `values` (n,) that are not zero.

    Of equal magnitudes the first in position is taken. `count` is at least 1, or n is 0.
    """
    magnitudes = values.abs()
    if count < values.numel():
        least = magnitudes.kthvalue(values.numel() - count + 1).values
        above, equal = magnitudes > least, magnitudes == least
        chosen = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    else:
        chosen = torch.ones_like(values, dtype=torch.bool)
    return chosen & (magnitudes > 0)


def gaps(mask: Tensor) -> Tensor:
    """Positions of the true entries of `mask` (n,) as bytes (m,)."""
    positions = mask.nonzero().view(-1)
    skipped = positions.diff(prepend=torch.tensor([-1])) - 1
    ends = (skipped // _MORE + 1).cumsum(0)
    written = torch.full((int(ends[-1]) if len(ends) else 0,), _MORE, dtype=torch.uint8)
    written[ends - 1] = (skipped % _MORE).to(torch.uint8)
    return written


def positions(written: Tensor, total: int, most: int) -> Tensor:
    """The positions (k,) that `gaps` wrote, ascending.

    Args:
        written: bytes (m,) from a peer.
        total: how many positions there are.
        most: how many may be named.

    Raises:
        CodecError: if the bytes end within a gap, or name too many positions or one too far.
    """
    if not written.numel():
        return torch.zeros(0, dtype=torch.int64)
    ends = written != _MORE
    if not bool(ends[-1]):
        raise CodecError("positions: the last gap has no end")
    found = (written.long() + ends).cumsum(0)[ends] - 1
    if len(found) > most:
        raise CodecError(f"positions: {len(found)} numbers are sent, at most {most} may be")
    if int(found[-1]) >= total:
        raise CodecError(f"positions: {int(found[-1])} is beyond the {total} numbers there are")
    return found
