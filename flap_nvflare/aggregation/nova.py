"""FedNova: sites that take different numbers of steps (Wang et al., arXiv 2007.07481).

With shares p_k, steps tau_k and y_k what site k made of the start x in its steps:

    x + tau_eff sum_k p_k (y_k - x) / tau_k,        tau_eff = sum_k p_k tau_k
    = x + s (sum_k q_k y_k - x),    q_k = p_k / tau_k / S,  S = sum_k p_k / tau_k,  s = S tau_eff

So a rule aggregates with the weights q_k, as it does with any weights (one that streams gives
site k the weight w_k / tau_k), and what it made is then moved away from the start by s. Mean
values differ from harmonic ones in one direction only: s >= 1, with equality for equal steps.

What y - x is depends on what the rule makes:

| rule | moved | exact |
|---|---|---|
| heads and tokens of every rule | x + s (y - x) | yes |
| a linear rule, `mean` | every tensor alike | yes; `mean` of factors, not of products |
| one that keeps a residual | every tensor alike, and the offset by what that misses | yes |
| one that makes factors from products | M_0 + s (M - M_0), cut again | the closest of rank r |

For the third, with dB and dA the changes of the factors, (B_0 + s dB)(A_0 + s dA) is more than
B_0 A_0 + s (B A - B_0 A_0) by s (s - 1) dB dA: the offset takes that off.

For the last M_0 would need the negative weight 1 - s, and weights are positive. The sign goes
into B: rule `svd` makes one of two adapters, B A with the share s / (2 s - 1) and -B_0 A_0 with
(s - 1) / (2 s - 1), both times 2 s - 1. So it has every gauge of that rule. M is the cut that
the rule made before; cutting twice loses little more, and nothing where the rank suffices.
The same with s < 1 is a server's step of that rate on products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair, pairs
from flap_nvflare.adapter.parcel import OFFSET_A, OFFSET_B
from flap_nvflare.aggregation.rule import (
    Aggregate,
    AggregationError,
    Card,
    Contribution,
    Round,
    dense_copies,
)
from flap_nvflare.aggregation.svd import Svd


def nova_weights(
    weights: Mapping[str, float], steps: Mapping[str, int]
) -> tuple[dict[str, float], float]:
    """The weights q_k, which add up to 1, sorted by site, and the scale s.

    Args:
        weights: positive weight by site; only the shares matter.
        steps: local steps by site, 1 or more.

    Raises:
        AggregationError: if there is no site, or a weight or a number of steps is missing or
            out of range.
    """
    if not weights or weights.keys() != steps.keys():
        raise AggregationError(
            f"weights of {sorted(weights)} and steps of {sorted(steps)}; give both for each site"
        )
    for site in sorted(weights):
        if not (math.isfinite(weights[site]) and weights[site] > 0 and steps[site] >= 1):
            raise AggregationError(
                f"site {site!r} has weight {weights[site]!r} and took {steps[site]!r} steps; "
                "expected a positive weight and at least one step"
            )
    total = math.fsum(weights.values())
    parts = {site: weights[site] / total / steps[site] for site in sorted(weights)}
    whole = math.fsum(parts.values())
    effective = math.fsum(weights[site] / total * steps[site] for site in weights)
    return {site: part / whole for site, part in parts.items()}, whole * effective


def moved_from_start(aggregate: Aggregate, card: Card, round: Round, scale: float) -> Aggregate:
    """An aggregate moved to `scale` times its distance from the round's start.

    Args:
        aggregate: what a rule made.
        card: the rule's.
        round: the round that the rule was given; its `start` holds what the aggregate holds.
        scale: s, of `nova_weights`, or a server's rate; 1 changes nothing.

    Returns:
        The moved aggregate. To its error that of a second cut is added, relative to what was
        cut then; what the rule keeps in its memory stays as it is.

    Raises:
        AggregationError: if the scale is not positive, a tensor is missing in the start, or the
            rule starts the adapter afresh, so that there is no distance.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise AggregationError(f"scale {scale!r} of a step; expected a positive number")
    if card.offset and aggregate.turned:
        raise AggregationError(
            "a rule that starts the adapter afresh leaves nothing to move from the start; "
            "choose the optimizer fedavg with server_rate 1"
        )
    if scale == 1:
        return aggregate
    for name in sorted(aggregate.tensors):
        if name not in round.start or round.start[name].shape != aggregate.tensors[name].shape:
            raise AggregationError(
                f"tensor {name!r} is not in the round's start, or not in its shape; give what "
                "the sites started from",
                name,
            )
    cut_again = card.pairs and not card.linear and not card.offset
    found = pairs(aggregate.tensors) if card.pairs else ()
    factors = {name for pair in found if cut_again for name in (pair.a, pair.b)}
    moved = {
        name: _moved(round.start[name], tensor, scale)
        for name, tensor in aggregate.tensors.items()
        if name not in factors
    }
    error, turned, offset = aggregate.error, aggregate.turned, dict(aggregate.offset)
    if factors:
        cut = _cut(aggregate.tensors, found, round, scale)
        moved |= cut.tensors
        error, turned = error + cut.error, cut.turned
    if card.offset:
        offset = _offset(aggregate, found, round, scale)
    dtypes = {name: tensor.dtype for name, tensor in aggregate.tensors.items()}
    return replace(
        aggregate, tensors=dense_copies(moved, dtypes), error=error, turned=turned, offset=offset
    )


def _moved(start: Tensor, target: Tensor, scale: float) -> Tensor:
    origin = start.detach().double()
    return origin + scale * (target.double() - origin)


def _cut(
    tensors: Mapping[str, Tensor], found: Sequence[Pair], round: Round, scale: float
) -> Aggregate:
    """The cut of s M + (1 - s) M_0: two adapters whose B hold sign and size of their shares."""
    cut, total = Svd(round), scale + abs(1 - scale)
    for site, source, share in (
        ("aggregate", tensors, scale),
        ("start", round.start, 1 - scale),
    ):
        signed = {pair.a: source[pair.a].double() for pair in found}
        for pair in found:
            signed[pair.b] = source[pair.b].double() * math.copysign(total, share)
        cut.add(Contribution(site, abs(share), signed))
    return cut.result()


def _offset(
    aggregate: Aggregate, found: Sequence[Pair], round: Round, scale: float
) -> dict[str, Tensor]:
    """s times the offset's change, less s (s - 1) dB dA: factors side by side, not cut."""
    offset: dict[str, Tensor] = {}
    for pair in found:
        new, old = aggregate.tensors, round.start
        terms = [
            (
                -scale * (scale - 1) * (new[pair.b].double() - old[pair.b].double()),
                new[pair.a].double() - old[pair.a].double(),
            )
        ]
        name_b, name_a = pair.stem + OFFSET_B, pair.stem + OFFSET_A
        for source, share in ((aggregate.offset, scale), (round.offset, 1 - scale)):
            if name_b in source:
                terms.append((share * source[name_b].double(), source[name_a].double()))
        offset[name_b] = torch.cat([b for b, _ in terms], dim=1).to(new[pair.b].dtype)
        offset[name_a] = torch.cat([a for _, a in terms], dim=0).to(new[pair.a].dtype)
    return offset
