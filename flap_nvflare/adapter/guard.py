"""The guard: accepts or refuses an update and says why. It trusts nobody and never raises.

What is right is known from the receiver's own spec, never from what arrived first. The same
checks serve the server (updates of sites) and a site (the server's adapter, without a weight).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
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
        max_steps: most optimiser steps a site may claim for a round.
        max_change: largest L2 norm of the difference to the receiver's own tensors; infinite
            for no bound. Only for a message in the receiver's basis: a rule that turns the
            factors makes the difference mean little.
    """

    max_norm: float = 1e4
    max_weight: float = 1e6
    max_steps: int = 100_000
    max_change: float = math.inf

    def __post_init__(self) -> None:
        if type(self.max_change) not in (int, float) or not self.max_change > 0:
            raise ValueError(
                f"max_change: {self.max_change!r} is not allowed; expected a positive number"
            )
        for name in ("max_norm", "max_weight", "max_steps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
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
    frozen: Collection[str] | Callable[[str], bool] = (),
    reference: Mapping[str, torch.Tensor] | None = None,
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
        frozen: names of the base's parameters, or a test of a name, to call a frozen key so.
        reference: the receiver's own tensors as `expected` says, for `limits.max_change`.
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
            or _tensors_fault(tensors, expected)
            or _size_fault(tensors, reference, limits)
            or _shapes_fault(spec, expected)
        )
    except Exception as error:  # an object made to break a check is refused, too
        fault = ("", f"the check itself failed: {_type_name(error)}")
    return None if fault is None else Refusal(site, expected_round, *fault)


def check_message(
    spec: Any,
    *,
    site: str,
    round_index: Any,
    expected_round: int,
    expected: UpdateSpec,
    weight: Any,
    limits: Limits = DEFAULT_LIMITS,
) -> Refusal | None:
    """What `check_update` checks of an update whose tensors are encrypted; arguments as there."""
    try:
        fault = (
            _message_fault(spec, round_index, expected_round, expected)
            or _weight_fault(weight, limits)
            or _shapes_fault(spec, expected)
        )
    except Exception as error:  # an object made to break a check is refused, too
        fault = ("", f"the check itself failed: {_type_name(error)}")
    return None if fault is None else Refusal(site, expected_round, *fault)


Fault = tuple[str, str] | None


def _message_fault(spec: Any, round_index: Any, expected_round: int, expected: UpdateSpec) -> Fault:
    if type(round_index) is not int or round_index != expected_round:
        return "", f"round {_short(round_index)}, expected {expected_round}"
    if type(spec) is not UpdateSpec:
        return "", f"spec is {_type_name(spec)}, no UpdateSpec"
    for name in ("base_sha256", "method", "rank", "dtype"):
        found, wanted = getattr(spec, name), getattr(expected, name)
        if found != wanted:
            return "", f"{name} {_short(found)}, expected {_short(wanted)}"
    return None


def _weight_fault(weight: Any, limits: Limits) -> Fault:
    if type(weight) not in (int, float) or (type(weight) is float and not math.isfinite(weight)):
        return "", f"weight {_short(weight)} is no finite number"
    if not 0 < weight <= limits.max_weight:
        return "", f"weight {_short(weight)} is not in (0, {limits.max_weight:g}]"
    return None


def _names_fault(
    tensors: Any, expected: UpdateSpec, frozen: Collection[str] | Callable[[str], bool]
) -> Fault:
    if type(tensors) not in (dict, OrderedDict):
        return "", f"tensors are {_type_name(tensors)}, expected a dict"
    is_frozen = frozen if callable(frozen) else frozen.__contains__
    texts = [name for name in tensors if type(name) is str]
    extra = [name for name in texts if name not in expected.shapes]
    if at_fault := sorted(name for name in extra if is_frozen(name)):
        return _short(at_fault[0]), "frozen key: it is part of the base and may not travel"
    if extra:
        return _short(min(extra)), "unexpected key: it may not travel"
    if len(texts) < len(tensors):
        odd = min(_short(name) for name in tensors if type(name) is not str)
        return odd, "unexpected key: it is no text"
    missing = sorted(set(expected.shapes) - set(tensors))
    return (missing[0], "missing key") if missing else None


def _tensors_fault(tensors: dict[str, Any], expected: UpdateSpec) -> Fault:
    dtype = getattr(torch, expected.dtype)
    for name in sorted(tensors):
        tensor = tensors[name]
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return name, f"{_type_name(tensor)}, no tensor"
        strided = tensor.layout == torch.strided and not tensor.is_nested
        if not strided or tensor.is_meta or tensor.is_quantized:
            return name, f"no plain dense tensor ({tensor.layout}, {tensor.dtype}, {tensor.device})"
        if tensor.dtype != dtype:
            return name, f"dtype {tensor.dtype}, expected {dtype}"
        if tuple(tensor.shape) != expected.shapes[name]:
            return name, f"shape {tuple(tensor.shape)}, expected {expected.shapes[name]}"
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            return name, f"{bad} of {tensor.numel()} values are not finite"
    return None


def _size_fault(
    tensors: dict[str, Any], reference: Mapping[str, torch.Tensor] | None, limits: Limits
) -> Fault:
    """Bounds on the tensors together, so it names no key."""
    norm = total_norm(tensors.values())
    if not norm <= limits.max_norm:
        return "", f"norm {norm:.6g} is above {limits.max_norm:g}"
    if reference is not None and math.isfinite(limits.max_change):
        change = total_norm(
            tensors[name].detach().double() - reference[name].detach().double() for name in tensors
        )
        if not change <= limits.max_change:
            return "", f"norm of the change {change:.6g} is above {limits.max_change:g}"
    return None


def total_norm(tensors: Iterable[torch.Tensor]) -> float:
    """L2 norm of all values together; in float64, where no float32 overflows."""
    return math.sqrt(math.fsum(float(x.detach().double().square().sum()) for x in tensors))


def _shapes_fault(spec: UpdateSpec, expected: UpdateSpec) -> Fault:
    """The tensors are right by now; a spec that says otherwise is a peer at odds with itself."""
    if dict(spec.shapes) != dict(expected.shapes):
        return "", "the spec's names or shapes are not those of its tensors"
    return None


def printable(text: str, most: int = 80) -> str:
    """At most so many characters of a peer's text, none of which can forge a line of a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def _short(value: Any) -> str:
    """At most 80 characters of a peer's value: a log line is no place for more."""
    if type(value) not in (str, int, float, bool, type(None)):
        return f"of type {_type_name(value)}"
    if type(value) is int and value.bit_length() > 256:  # Python refuses to print huge ones
        return f"of {value.bit_length()} bits"
    text = value if isinstance(value, str) else repr(value)
    return printable(text)


def _type_name(value: Any) -> str:
    """The name of the value's class, past a metaclass that would answer otherwise."""
    return str(type.__dict__["__name__"].__get__(type(value)))[:80]
