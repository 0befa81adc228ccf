"""The guard against whatever a peer may send: it accepts the right update alone, never raises."""

from __future__ import annotations

import math
from collections import OrderedDict, UserDict
from typing import Any

import numpy as np
import pytest
import torch
from guard_cases import FROZEN, SHAPES, SPEC, Hostile, good, odd_tensors
from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.adapter.guard import Limits, Refusal, check_update
from flap_nvflare.adapter.update import UpdateSpec


def checked(tensors: Any = None, spec: Any = SPEC, **changes: Any) -> Refusal | None:
    arguments: dict[str, Any] = {
        "site": "A",
        "round_index": 3,
        "expected_round": 3,
        "expected": SPEC,
        "frozen": FROZEN,
        "weight": 9.0,
        **changes,
    }
    return check_update(good() if tensors is None else tensors, spec, **arguments)


def refused(*arguments: Any, **changes: Any) -> tuple[str, str]:
    refusal = checked(*arguments, **changes)
    assert refusal is not None
    assert (refusal.site, refusal.round) == ("A", 3)
    return refusal.key, refusal.reason


@given(st.integers(0, 2**31), st.floats(1e-300, 1e6), st.permutations(sorted(SHAPES)))
def test_a_right_update_counts(seed: int, weight: float, order: list[str]) -> None:
    tensors = good(seed)
    assert checked({name: tensors[name] for name in order}, weight=weight) is None


def test_right_updates_at_the_edges_count() -> None:
    assert checked(weight=1) is None
    assert checked(weight=10**6) is None
    assert checked({name: torch.zeros(shape) for name, shape in SHAPES.items()}) is None
    assert checked({name: torch.nn.Parameter(x) for name, x in good().items()}) is None
    turned = {**good(), "q.lora_a": torch.ones(3, 2).T}
    assert checked(turned) is None
    assert checked(OrderedDict(good())) is None
    assert checked(spec=UpdateSpec.from_dict(SPEC.to_dict())) is None


def test_the_check_changes_nothing() -> None:
    tensors = good()
    assert checked(tensors) is None
    assert all(torch.equal(tensors[name], tensor) for name, tensor in good().items())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("image_encoder.pos_embed", "frozen key"),
        ("something", "unexpected key"),
        ("q.lora_A", "unexpected key"),
        ("", "unexpected key"),
    ],
)
def test_keys_that_may_not_travel(name: str, kind: str) -> None:
    key, reason = refused({**good(), name: torch.ones(1)})
    assert key == name
    assert reason.startswith(kind)


def test_a_frozen_key_is_named_before_any_other() -> None:
    extra = {"a": torch.ones(1), "mask_decoder.iou_token": torch.ones(1), 3: torch.ones(1)}
    assert refused({**good(), **extra})[0] == "mask_decoder.iou_token"


def test_frozen_names_may_be_a_test_of_the_name() -> None:
    frozen = str.isupper
    tensors = {**good(), "BASE": torch.ones(1), "also": torch.ones(1)}
    assert refused(tensors, frozen=frozen)[0] == "BASE"
    assert refused({**good(), "also": torch.ones(1)}, frozen=frozen)[1].startswith("unexpected")


def test_a_missing_key() -> None:
    tensors = good()
    del tensors["q.lora_a"], tensors["q.lora_b"]
    assert refused(tensors) == ("q.lora_a", "missing key")
    assert refused({}) == ("head.scale", "missing key")


class Text(str):
    """A key that claims to be every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash("q.lora_a")


@pytest.mark.parametrize("key", [1, None, b"q.lora_a", ("q", "lora_a"), 2.5, Text("x"), torch.int8])
def test_keys_that_are_no_text(key: Any) -> None:
    tensors = {name: x for name, x in good().items() if name != "q.lora_a"}
    assert refused({**tensors, key: torch.ones(2, 3)})[1].startswith("unexpected key")


@pytest.mark.parametrize(
    "tensors",
    [[], (), "tensors", 3, b"", object(), torch.ones(2), UserDict(good())],
)
def test_tensors_that_are_no_dict(tensors: Any) -> None:
    assert "expected a dict" in refused(tensors)[1]


@pytest.mark.parametrize("reason", odd_tensors())
def test_tensors_that_are_not_as_expected(reason: str) -> None:
    key, said = refused({**good(), "q.lora_a": odd_tensors()[reason]})
    assert key == "q.lora_a"
    assert reason in said


@pytest.mark.parametrize(
    "weight",
    [
        0, -1, 0.0, -0.0, -1e-9, 1e12, 1000001, math.nan, math.inf, -math.inf, True, "3", None,
        10**400, -(10**400), 10**5000, [1.0], 1j, np.float64(3), np.nan, torch.tensor(1.0), object,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_weights_that_do_not_count(weight: Any) -> None:
    key, reason = refused(weight=weight)
    assert key == ""
    assert reason.startswith("weight")


@pytest.mark.parametrize(
    "round_index",
    [2, 4, -3, True, 3.0, "3", None, 10**5000, [3], torch.tensor(3), np.int64(3)],
    ids=lambda value: type(value).__name__,
)
def test_rounds_that_are_not_under_way(round_index: Any) -> None:
    key, reason = refused(round_index=round_index)
    assert key == ""
    assert reason.startswith("round")
    assert reason.endswith("expected 3")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base_sha256": "cd" * 32}, "base_sha256 cdcd"),
        ({"method": "full"}, "method full, expected flap"),
        ({"rank": 4}, "rank 4, expected 2"),
        ({"dtype": "float16"}, "dtype float16, expected float32"),
        ({"shapes": {}}, "the spec"),
        ({"shapes": {**SHAPES, "q.lora_a": [3, 2]}}, "the spec"),
    ],
)
def test_specs_that_are_not_the_receivers(change: dict[str, Any], reason: str) -> None:
    key, said = refused(spec=UpdateSpec.from_dict({**SPEC.to_dict(), **change}))
    assert key == ""
    assert said.startswith(reason)


@pytest.mark.parametrize("spec", [None, {}, SPEC.to_dict(), "spec", 3])
def test_what_is_no_spec(spec: Any) -> None:
    assert "no UpdateSpec" in refused(spec=spec)[1]


def test_the_norm_is_that_of_all_tensors_together() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["head.scale"] = torch.tensor(3.0)
    tensors["head.weight"] = torch.tensor([0.0, 4.0, 0.0, 0.0, 0.0])
    assert checked(tensors, limits=Limits(max_norm=5.0)) is None
    assert refused(tensors, limits=Limits(max_norm=4.99)) == ("", "norm 5 is above 4.99")


def test_a_norm_beyond_float32_is_still_found() -> None:
    key, reason = refused({**good(), "head.weight": torch.full((5,), 3e38)})
    assert (key, reason) == ("", f"norm {math.sqrt(5) * 3e38:.6g} is above 10000")


def test_the_change_is_measured_against_the_receivers_own_tensors() -> None:
    reference = {name: torch.full(shape, 10.0) for name, shape in SHAPES.items()}
    sent = {**reference, "head.scale": torch.tensor(13.0)}
    sent["q.lora_a"] = reference["q.lora_a"].clone()
    sent["q.lora_a"][0, 0] -= 4.0
    assert checked(sent, reference=reference) is None
    assert checked(sent, reference=reference, limits=Limits(max_change=5.0)) is None
    said = refused(sent, reference=reference, limits=Limits(max_change=4.99))
    assert said == ("", "norm of the change 5 is above 4.99")


def test_a_message_from_the_server_has_no_weight_and_all_other_checks() -> None:
    assert checked(weighted=False, weight=None) is None
    assert refused(weight=None)[1].startswith("weight")
    tensors = {**good(), "image_encoder.pos_embed": torch.ones(1)}
    assert refused(tensors, weighted=False)[1].startswith("frozen key")
    assert refused(weighted=False, round_index=2)[1].startswith("round")


def test_the_answer_does_not_depend_on_the_order_of_the_tensors() -> None:
    tensors = {**good(), "q.lora_a": torch.ones(1), "q.lora_b": torch.ones(1)}
    assert checked(tensors) == checked(dict(reversed(tensors.items())))


class Anonymous(type):
    @property
    def __name__(cls) -> Any:
        raise RuntimeError("touched")


class Nameless(metaclass=Anonymous):
    pass


class HostileKey(Hostile):
    def __hash__(self) -> int:
        return hash("q.lora_a")


def test_objects_that_raise_are_refused() -> None:
    bad = Hostile()
    for key, reason in (
        refused(bad),
        refused(spec=bad),
        refused(weight=bad),
        refused(round_index=bad),
        refused({**good(), "q.lora_a": bad}),
        refused({**good(), bad: torch.ones(1)}),
        refused({HostileKey(): torch.ones(1)}),
        refused({**good(), "x": bad}),
        refused(Nameless()),
        refused(spec=Nameless()),
        refused(weight=Nameless()),
        refused({**good(), "q.lora_a": Nameless()}),
        refused({**good(), Nameless(): torch.ones(1)}),
    ):
        assert len(key) <= 80
        assert reason


def test_what_a_peer_writes_is_no_log_of_its_own() -> None:
    for key, reason in (
        refused({**good(), "x\nREFUSED nothing\x1b[2J" + "y" * 10**6: torch.ones(1)}),
        refused(weight="9\n" * 10**6),
        refused(round_index="3\r\n" * 10**6),
        refused(spec=UpdateSpec("flap\n" * 10**6, 2, "", {})),
    ):
        assert len(key) + len(reason) < 300
        assert (key + reason).isprintable()


@pytest.mark.parametrize("value", [0, -1, math.nan, "1", True, None])
@pytest.mark.parametrize("name", ["max_norm", "max_weight", "max_change"])
def test_limits_must_be_positive_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: value})


def test_a_check_that_breaks_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RecursionError

    monkeypatch.setattr(torch, "isfinite", broken)
    assert refused() == ("", "the check itself failed: RecursionError")
