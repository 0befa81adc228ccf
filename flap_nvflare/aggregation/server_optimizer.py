"""The server's step: how the aggregate of a round moves the adapter that the round started from.

With x the start, y the aggregate and d = y - x, for every tensor by itself:

    fedavg    x + rate d                                     rate 1: y as it is
    fedavgm   m = beta m + d,                                x + rate m
    fedadam   m = beta m + (1 - beta) d,   v = beta2 v + (1 - beta2) d^2,
              x + rate m / (sqrt(v) + tau)

FedAvgM: Hsu et al., arXiv 1909.06335. FedAdam: Reddi et al., arXiv 2003.00295, algorithm 2, with
its beta2 = 0.99 and tau = 1e-3, v = tau^2 at first, and as there without correction of the first
rounds' bias. FedProx and SCAFFOLD step as `fedavg` does; FedNova is in `nova`.

A step on factors has a meaning only where the rule keeps their basis. Where the aggregate's
factors are turned, y - x mixes two bases and m points nowhere: there the aggregate's factors
are taken as they are and their moments are dropped, those of the head never. So with rule `svd`
in its own gauges only the head is accelerated. The gauge `aligned` turns the new basis back
instead, so that the moments stay valid.

Everything is computed in float64 and is a pure function: equal inputs, equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import LORA_A, LORA_B
from flap_nvflare.aggregation.exact_sum import ExactSum
from flap_nvflare.aggregation.rule import AggregationError

KINDS = ("fedavg", "fedavgm", "fedadam")
MOMENTUM, SQUARE = "momentum/", "square/"
SECOND_DECAY, TAU = 0.99, 1e-3

Tensors = Mapping[str, Tensor]


def server_step(
    kind: str,
    start: Tensors,
    target: Tensors,
    memory: Tensors,
    *,
    rate: float,
    momentum: float,
    turned: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of the server.

    Args:
        kind: one of `KINDS`.
        start: the adapter that the round's sites started from.
        target: the rule's aggregate; tensors of `start` that did not train may be missing.
        memory: what the last step returned; empty before the first.
        rate: of the step; with `fedadam` the size of a step of one number.
        momentum: beta, decay of the first moment.
        turned: whether the target's factors are in another basis than the start's.

    Returns:
        The stepped tensors, with the names and dtypes of `target`, and the memory in float64:
        `momentum/<name>` and `square/<name>`. What `target` lacks keeps its memory.

    Raises:
        AggregationError: on an unknown kind, a rate or decay out of range, or tensors of
            `target` or `memory` that do not fit `start`.
    """
    if kind not in KINDS:
        raise AggregationError(f"server step {kind!r} is not known; expected one of {KINDS}")
    if not (math.isfinite(rate) and rate > 0):
        raise AggregationError(f"server_rate {rate!r}; expected a positive number")
    if not 0 <= momentum < 1:
        raise AggregationError(f"server_momentum {momentum!r}; expected a number in [0, 1)")
    stepped: dict[str, Tensor] = {}
    kept = {} if kind == "fedavg" else dict(memory)
    for name, aim in sorted(target.items()):
        _check_fits(name, aim, start, "start")
        if turned and name.endswith((LORA_A, LORA_B)):
            stepped[name] = aim.detach().clone()
            kept.pop(MOMENTUM + name, None)
            kept.pop(SQUARE + name, None)
            continue
        if kind == "fedavg" and rate == 1:  # in bits, not but for the rounding of x + (y - x)
            stepped[name] = aim.detach().clone()
            continue
        origin = start[name].detach().double()
        step = aim.detach().double() - origin
        if kind != "fedavg":
            step = _accelerated(kind, name, step, kept, momentum)
        stepped[name] = (origin + rate * step).to(aim.dtype)
    return stepped, dict(sorted(kept.items()))


def _accelerated(
    kind: str, name: str, change: Tensor, kept: dict[str, Tensor], momentum: float
) -> Tensor:
    """The step before its rate; the moments in `kept` are replaced."""
    zero = torch.zeros_like(change)
    first = kept.get(MOMENTUM + name, zero)
    _check_fits(name, change, {name: first}, "memory")
    share = 1.0 if kind == "fedavgm" else 1 - momentum
    first = momentum * first.double() + share * change
    kept[MOMENTUM + name] = first
    if kind == "fedavgm":
        return first
    second = kept.get(SQUARE + name, zero + TAU**2)
    _check_fits(name, change, {name: second}, "memory")
    second = SECOND_DECAY * second.double() + (1 - SECOND_DECAY) * change.square()
    kept[SQUARE + name] = second
    return first / (second.sqrt() + TAU)


def scaffold_control(
    control: Tensors, changes: Mapping[str, Tensors], sites: int
) -> dict[str, Tensor]:
    """SCAFFOLD's control at the server, c + (1 / N) sum_k (c_k' - c_k) (arXiv 1910.06378, eq. 5).

    Args:
        control: c; zero where a name is missing: before the first round, or because the basis
            of a factor has turned.
        changes: c_k' - c_k of the sites that answered in this round, by site.
        sites: N, all sites of the federation, those that did not answer included.

    Returns:
        The new c in the dtypes of the changes; equal in bits in whatever order they came.

    Raises:
        AggregationError: if no site or more than `sites` answered, or names or shapes differ.
    """
    if not 1 <= len(changes) <= sites:
        raise AggregationError(
            f"{len(changes)} changes of controls from {sites} sites; expected 1 to {sites}"
        )
    first = min(changes)
    likes = changes[first]
    moved: dict[str, Tensor] = {}
    for site, change in sorted(changes.items()):
        for name in sorted(set(likes) ^ set(change)):
            raise AggregationError(
                f"control {name!r} came from one of the sites {first!r} and {site!r} only", name
            )
    for name, like in sorted(likes.items()):
        total = ExactSum()
        for change in changes.values():  # an exact sum has no order
            _check_fits(name, change[name], {name: like}, f"change of site {first!r}")
            total.add(change[name].detach().double().clone())
        mean = total.total() / sites
        if name in control:
            _check_fits(name, mean, control, "control")
            mean += control[name].detach().double()
        moved[name] = mean.to(like.dtype)
    return moved


def _check_fits(name: str, tensor: Tensor, known: Tensors, where: str) -> None:
    if name not in known:
        raise AggregationError(f"tensor {name!r} is not in the {where}; step from what was sent")
    if known[name].shape != tensor.shape:
        raise AggregationError(
            f"tensor {name!r} is {tuple(tensor.shape)}, in the {where} "
            f"{tuple(known[name].shape)}; start anew",
            name,
        )
