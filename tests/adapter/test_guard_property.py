"""Hundreds of malformed updates: the guard accepts none of them and never raises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from guard_cases import FROZEN, SHAPES, SPEC, Hostile, good, odd_tensors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flap_nvflare.adapter.guard import Refusal, check_update
from flap_nvflare.adapter.update import UpdateSpec

# One malformed update: a right one, spoilt at one to three places, and sent in any round.
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.binary(max_size=5), st.lists(st.integers(), max_size=3), st.builds(Hostile),
    st.sampled_from([np.ones(3), np.float32(1), SPEC, SPEC.to_dict(), torch.ones(1), object()]),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=8), st.integers(), st.none(), st.binary(max_size=3), st.floats(),
    st.sampled_from(sorted(FROZEN)), st.tuples(st.integers()), st.builds(Hostile),
)  # fmt: skip
TENSORS = st.one_of(
    st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.cfloat]),
    ),
    st.sampled_from(list(odd_tensors().values())),
    ANYTHING,
)
Message = dict[str, Any]


def _fits(value: Any, name: str) -> bool:
    """Whether a drawn value happens to be right."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_nested or value.is_meta)
        and value.dtype == torch.float32
        and tuple(value.shape) == SHAPES[name]
        and bool(value.isfinite().all())
    )


@st.composite
def spoilt_tensor(draw: st.DrawFn) -> Callable[[Message], None]:
    name, value = draw(st.sampled_from(sorted(SHAPES))), draw(TENSORS)
    assume(not _fits(value, name))
    return lambda message: message["tensors"].update({name: value})


@st.composite
def spoilt_value(draw: st.DrawFn) -> Callable[[Message], None]:
    name = draw(st.sampled_from(sorted(SHAPES)))
    value = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e5, -3e38]))
    place = draw(st.integers(0, math.prod(SHAPES[name]) - 1))

    def spoil(message: Message) -> None:
        tensor = torch.ones(SHAPES[name])
        tensor.view(-1)[place] = value
        message["tensors"][name] = tensor

    return spoil


@st.composite
def spoilt_keys(draw: st.DrawFn) -> Callable[[Message], None]:
    if draw(st.booleans()):
        gone = draw(st.sampled_from(sorted(SHAPES)))
        return lambda message: message["tensors"].pop(gone, None)
    key, value = draw(KEYS), draw(TENSORS)
    assume(type(key) is not str or key not in SHAPES)
    return lambda message: message["tensors"].update({key: value})


@st.composite
def spoilt_field(draw: st.DrawFn) -> Callable[[Message], None]:
    field = draw(st.sampled_from(["spec", "round_index", "weight"]))
    value = draw(ANYTHING)
    if field == "weight":
        value = draw(st.one_of(ANYTHING, st.floats(max_value=0), st.floats(min_value=1.1e6)))
        assume(type(value) not in (int, float) or not 0 < value <= 1e6)
    elif field == "round_index":
        assume(type(value) is not int or value != 3)
    else:
        assume(type(value) is not UpdateSpec)
    return lambda message: message.update({field: value})


@st.composite
def spoilt_spec(draw: st.DrawFn) -> Callable[[Message], None]:
    values = SPEC.to_dict()
    field = draw(st.sampled_from(["method", "rank", "base_sha256", "dtype", "shapes"]))
    values[field] = draw(
        {
            "method": st.sampled_from(["full", "", "FLAP"]),
            "rank": st.integers(3, 99),
            "base_sha256": st.text("0123456789abcdef", max_size=63),
            "dtype": st.sampled_from(["float16", "int8", "complex64"]),
            "shapes": st.dictionaries(st.text(max_size=4), st.lists(st.integers(0, 9)), max_size=3),
        }[field]
    )
    return lambda message: message.update({"spec": UpdateSpec.from_dict(values)})


@st.composite
def replaced_tensors(draw: st.DrawFn) -> Callable[[Message], None]:
    value = draw(ANYTHING)
    # Put in last: other faults need a dict to go into.
    return lambda message: message.update({"instead": value})


FAULTS = st.one_of(
    spoilt_tensor(),
    spoilt_value(),
    spoilt_keys(),
    spoilt_field(),
    spoilt_spec(),
    replaced_tensors(),
)


@given(st.lists(FAULTS, min_size=1, max_size=3), st.integers(0, 9))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_no_malformed_update_counts_and_none_raises(
    faults: list[Callable[[Message], None]], seed: int
) -> None:
    message: Message = {"tensors": good(seed), "spec": SPEC, "round_index": 3, "weight": 9.0}
    for fault in faults:
        fault(message)
    tensors = message["instead"] if "instead" in message else message["tensors"]
    refusal = check_update(
        tensors,
        message["spec"],
        site="A",
        round_index=message["round_index"],
        expected_round=3,
        expected=SPEC,
        frozen=FROZEN,
        weight=message["weight"],
    )
    assert isinstance(refusal, Refusal)
    assert (refusal.site, refusal.round) == ("A", 3)
    assert type(refusal.key) is str
    assert refusal.reason
    assert len(refusal.key) + len(refusal.reason) < 400


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING)
@settings(max_examples=200, deadline=None)
def test_four_arbitrary_objects_are_refused(
    tensors: Any, spec: Any, round_index: Any, weight: Any
) -> None:
    refusal = check_update(
        tensors,
        spec,
        site="A",
        round_index=round_index,
        expected_round=3,
        expected=SPEC,
        weight=weight,
    )
    assert isinstance(refusal, Refusal)
