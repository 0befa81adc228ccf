"""The basis of factors that a rule makes from products: B A = (B Q)(Q^T A).

`balanced` and `paper` come out of the cut, see `svd`. `aligned` starts from `balanced` and turns
it by the orthogonal Q that brings the factors nearest to B0 and A0, those that the sites started
from:

    min over Q of  |B Q - B0|^2 + |Q^T A - A0|^2,    Q = U V^T of B^T B0 + A A0^T = U S V^T

(the orthogonal Procrustes problem, Schoenemann 1966, for both factors at once). The product is
the same, and entry i, j of a factor means what it meant to the sites' optimisers, so that their
moments stay of use.

Directions that the mean product does not have take part: there B is zero and A's row is free
(see `svd`), and all r rows of A are orthogonal, so Q turns them among themselves as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import LORA_A, LORA_B, Pair, pairs
from flap_nvflare.aggregation.cut import Cut
from flap_nvflare.aggregation.rule import AggregationError, Contribution, Round

FIXED_GAUGES = ("balanced", "paper")
"""Gauges that the product alone determines."""

GAUGES = (*FIXED_GAUGES, "aligned")


def check_gauge(round: Round) -> None:
    """Refuses a gauge that is unknown or has nothing to align with.

    Raises:
        AggregationError: then.
    """
    if round.gauge not in GAUGES:
        raise AggregationError(f"gauge {round.gauge!r} is not known; expected one of {GAUGES}")
    if round.gauge != "aligned":
        return
    if not round.start:
        raise AggregationError(
            "gauge 'aligned' needs the adapter that the sites started from; give it as the "
            "round's start, or choose the gauge 'balanced'"
        )
    for pair in pairs(round.start):
        rank = round.start[pair.a].shape[0]
        if round.rank not in (0, rank):
            raise AggregationError(
                f"adapter {pair.stem!r} started with rank {rank}, and {round.rank} is wanted; "
                "gauge 'aligned' keeps the rank: choose the gauge 'balanced'",
                pair.a,
            )


def check_start(contribution: Contribution, round: Round) -> None:
    """Refuses, in the gauge `aligned`, factors of another shape than those at the start.

    Raises:
        AggregationError: if a factor's shape differs, for instance in its rank.
    """
    if round.gauge != "aligned":
        return
    for name, tensor in sorted(contribution.tensors.items()):
        if not name.endswith((LORA_A, LORA_B)):
            continue
        start = round.start.get(name)
        if start is None or start.shape != tensor.shape:
            expected = "nothing" if start is None else tuple(start.shape)
            raise AggregationError(
                f"tensor {name!r} of site {contribution.site!r} is {tuple(tensor.shape)}, and "
                f"{expected} at the round's start; gauge 'aligned' needs one rank at all sites: "
                "choose the gauge 'balanced' for sites of unequal ranks",
                name,
            )


def in_gauge(cut: Cut, pair: Pair, round: Round) -> Cut:
    """A cut in the round's gauge, from one that was made with it (see `cut.cut_stack`)."""
    if round.gauge != "aligned":
        return cut
    b, a = aligned(cut.b, cut.a, round.start[pair.b].double(), round.start[pair.a].double())
    return cut._replace(b=b, a=a)


def aligned(b: Tensor, a: Tensor, start_b: Tensor, start_a: Tensor) -> tuple[Tensor, Tensor]:
    """B Q and Q^T A with the orthogonal Q that brings them nearest to the start.

    Args:
        b: (out, r), float64 like the others.
        a: (r, in).
        start_b: B0, (out, r).
        start_a: A0, (r, in).
    """
    u, _, vh = torch.linalg.svd(b.mT @ start_b + a @ start_a.mT)
    turn = u @ vh
    return b @ turn, turn.mT @ a
