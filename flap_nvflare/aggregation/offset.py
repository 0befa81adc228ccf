"""The change of the frozen base that rules keep besides the adapter.

`<stem>.offset_b` (out, q) and `<stem>.offset_a` (q, in) hold the whole change since the first
round. In each round the new one is made from the old one, what the updates add, and what the
adapter itself goes on to hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.adapter.parcel import OFFSET_A, OFFSET_B
from flap_nvflare.aggregation.low_rank import (
    Terms,
    energy_of,
    extended,
    factors_of,
    shape_of,
    shortened,
)
from flap_nvflare.aggregation.products import Factors
from flap_nvflare.aggregation.rule import Aggregate, AggregationError, Round, relative_error


class Offset(NamedTuple):
    """The offset of one adapter.

    Attributes:
        tensors: its two factors by name; none if there is no change.
        lost: squared Frobenius norm of what the cut dropped.
        exact: squared Frobenius norm of the mean product.
    """

    tensors: dict[str, Tensor]
    lost: float
    exact: float


def check_energy(round: Round) -> None:
    """Refuses a share of energy that no cut can keep.

    Raises:
        AggregationError: if it is not in (0, 1].
    """
    if not 0.0 < round.energy <= 1.0:
        raise AggregationError(
            f"energy {round.energy!r}; expected a share above 0 and at most 1 (all of it)"
        )


def new_offset(
    mean: Terms,
    pair: Pair,
    round: Round,
    dtype: torch.dtype,
    sent: tuple[Tensor, Tensor] | None = None,
) -> Offset:
    """The cut of old offset + mean product - what the adapter holds.

    Args:
        mean: the mean product M.
        pair: the adapter.
        round: its offset and energy.
        dtype: that of the updates; the offset has it too, or float32 if it is shorter.
        sent: B and A of the aggregate as they are sent, rounded; none if their product is zero.

    Raises:
        AggregationError: if the round's offset does not fit to the adapter.
    """
    old = factors_of(round.offset, pair.stem, "offset", shape_of(mean))
    minus = [] if sent is None else [Factors("", 1.0, -sent[0], sent[1])]
    exact = energy_of(mean)
    beside = exact + (energy_of(old) if old else 0.0)
    cut = shortened(extended(mean, [*old, *minus]), round.energy, beside)
    if not cut.b.shape[1]:
        return Offset({}, cut.lost, exact)
    kind = torch.promote_types(dtype, torch.float32)
    names = pair.stem + OFFSET_A, pair.stem + OFFSET_B
    tensors = {
        name: x.to(kind, copy=True, memory_format=torch.contiguous_format)
        for name, x in zip(names, (cut.a, cut.b), strict=True)
    }
    return Offset(tensors, cut.lost, exact)


def with_offsets(tensors: dict[str, Tensor], offsets: Sequence[Offset], turned: bool) -> Aggregate:
    """The aggregate of an adapter and the offsets of its slots.

    Args:
        tensors: the adapter.
        offsets: those of all its slots.
        turned: see `Aggregate`.
    """
    return Aggregate(
        tensors=tensors,
        error=relative_error(
            math.fsum(one.lost for one in offsets), math.fsum(one.exact for one in offsets)
        ),
        turned=turned,
        offset=dict(sorted(item for one in offsets for item in one.tensors.items())),
    )
