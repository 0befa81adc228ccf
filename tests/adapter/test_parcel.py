"""One message: the adapter with what some rules and optimisers send beside it."""

from __future__ import annotations

import torch

from flap_nvflare.adapter.parcel import CONTROL, OFFSET_A, OFFSET_B, Parcel, parcel

ONE = torch.ones(1)
WHOLE = Parcel(
    tensors={"q.lora_a": ONE, "q.lora_b": 2 * ONE, "head": 3 * ONE},
    offset={"q" + OFFSET_A: 4 * ONE, "q" + OFFSET_B: 5 * ONE},
    control={"q.lora_a": 6 * ONE, "head": 7 * ONE},
)


def test_a_message_has_all_parts_under_names_of_their_own() -> None:
    assert {name: float(tensor) for name, tensor in WHOLE.flat().items()} == {
        "q.lora_a": 1.0,
        "q.lora_b": 2.0,
        "head": 3.0,
        "q.offset_a": 4.0,
        "q.offset_b": 5.0,
        "control/q.lora_a": 6.0,
        "control/head": 7.0,
    }


def test_its_parts_are_found_by_their_names_in_any_order() -> None:
    flat = WHOLE.flat()
    assert parcel(flat) == WHOLE
    assert parcel(dict(reversed(flat.items()))) == WHOLE


def test_a_control_of_anything_is_a_control() -> None:
    found = parcel({CONTROL + "q" + OFFSET_A: ONE})
    assert found == Parcel({}, {}, {"q" + OFFSET_A: ONE})


def test_an_adapter_alone_has_no_other_parts() -> None:
    assert parcel(WHOLE.tensors) == Parcel(WHOLE.tensors, {}, {})
    assert parcel({}) == Parcel({}, {}, {})
