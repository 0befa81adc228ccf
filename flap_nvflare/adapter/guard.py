"""The guard: accepts or refuses an update and says why. It trusts nobody and never raises.

What is right is known from the receiver's own spec, never from what arrived first.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from flap_nvflare.adapter.update import UpdateSpec


@dataclass(frozen=True)
class Refusal:
    """An update that does not count.

    Attributes:
        site: who sent it.
        round: the round in which it arrived.
        key: the tensor at fault; empty if the fault is the message's.
        reason: what is wrong.
    """

    site: str
    round: int
    key: str
    reason: str


@dataclass(frozen=True)
class Limits:
    """Bounds on what a peer may send.

    Attributes:
        max_norm: largest L2 norm of all tensors of an update together.
        max_weight: largest weight a site may claim.
    """

    max_norm: float = 1e4
    max_weight: float = 1e6

    def __post_init__(self) -> None:
        for name in ("max_norm", "max_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: {value!r} is not allowed; expected a positive number")


DEFAULT_LIMITS = Limits()


def check_update(
    tensors: Any,
    spec: Any,
    *,
    site: str,
    round_index: Any,
    expected_round: int,
    expected: UpdateSpec,
    frozen: Collection[str] = (),
    weight: Any = None,
    weighted: bool = True,
    limits: Limits = DEFAULT_LIMITS,
) -> Refusal | None:
    """Checks what a peer sent, of whatever type, against what the receiver expects.

    Args:
        tensors: the peer's tensors by name.
        spec: the peer's `UpdateSpec`.
        site: the peer's name, as its certificate or session says, not as the message does.
        round_index: the round that the message says it belongs to.
        expected_round: the round under way.
        expected: the receiver's own spec.
        frozen: names of the base's parameters, to call a frozen key by its name.
        weight: the peer's weight in the aggregate.
        weighted: False for a message that has no weight (from the server).
        limits: bounds on norm and weight.

    Returns:
        The first fault found, or None if the update counts.
    """
    try:
        fault = (
            _message_fault(spec, round_index, expected_round, expected)
            or (_weight_fault(weight, limits) if weighted else None)
            or _names_fault(tensors, expected, frozen)
            or _tensors_fault(tensors, expected, limits)
        )
    except Exception as error:  # an object made to break a check is refused, too
        fault = ("", f"the check itself failed: {type(error).__name__}")
    return None if fault is None else Refusal(site, expected_round, *fault)


Fault = tuple[str, str] | None


def _message_fault(spec: Any, round_index: Any, expected_round: int, expected: UpdateSpec) -> Fault:
    if type(round_index) is not int or round_index != expected_round:
        return "", f"round {_short(round_index)}, expected {expected_round}"
    if not isinstance(spec, UpdateSpec):
        return "", f"spec is {type(spec).__name__}, no UpdateSpec"
    for name in ("base_sha256", "method", "rank", "dtype"):
        found, wanted = getattr(spec, name), getattr(expected, name)
        if found != wanted:
            return "", f"{name} {_short(found)}, expected {_short(wanted)}"
    return None


def _weight_fault(weight: Any, limits: Limits) -> Fault:
    if type(weight) not in (int, float) or not math.isfinite(weight):
        return "", f"weight {_short(weight)} is no finite number"
    if not 0 < weight <= limits.max_weight:
        return "", f"weight {weight:g} is not in (0, {limits.max_weight:g}]"
    return None


def _names_fault(tensors: Any, expected: UpdateSpec, frozen: Collection[str]) -> Fault:
    if type(tensors) is not dict:
        return "", f"tensors are {type(tensors).__name__}, expected a dict"
    extra = [name for name in tensors if type(name) is not str or name not in expected.shapes]
    for name in sorted(extra, key=lambda item: (item not in frozen, _short(item))):
        kind = "frozen key" if type(name) is str and name in frozen else "unexpected key"
        return _short(name), f"{kind}: it may not travel"
    missing = sorted(set(expected.shapes) - set(tensors))
    return (missing[0], "missing key") if missing else None


def _tensors_fault(tensors: dict[str, Any], expected: UpdateSpec, limits: Limits) -> Fault:
    dtype = getattr(torch, expected.dtype)
    squares = 0.0
    for name in sorted(tensors):
        tensor = tensors[name]
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return name, f"{type(tensor).__name__}, no tensor"
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            return name, f"no plain dense tensor ({tensor.layout}, {tensor.device})"
        if tensor.dtype != dtype:
            return name, f"dtype {tensor.dtype}, expected {dtype}"
        if tuple(tensor.shape) != expected.shapes[name]:
            return name, f"shape {tuple(tensor.shape)}, expected {expected.shapes[name]}"
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            return name, f"{bad} of {tensor.numel()} values are not finite"
        squares += float(tensor.detach().double().square().sum())
    norm = math.sqrt(squares)
    if norm > limits.max_norm:
        return "", f"norm {norm:.3g} is above {limits.max_norm:g}"
    return None


def _short(value: Any) -> str:
    """At most 80 characters of a peer's value: a log line is no place for more."""
    if type(value) not in (str, int, float, bool, type(None)):
        return f"of type {type(value).__name__}"
    text = value if isinstance(value, str) else repr(value)
    return "".join(c if c.isprintable() else "?" for c in text[:80])
