"""The server's step, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.aggregation import AggregationError
from flap_nvflare.aggregation.server_optimizer import KINDS, scaffold_control, server_step


def tensors(**values: list) -> dict[str, torch.Tensor]:
    names = {"a": "q.lora_a", "b": "q.lora_b"}
    return {names.get(key, key): torch.tensor(value) for key, value in values.items()}


def test_fedavg_with_rate_one_is_the_target_in_bits() -> None:
    start, target = tensors(head=[1e8, 0.1]), tensors(head=[0.3, 0.7])
    stepped, memory = server_step("fedavg", start, target, {}, rate=1.0, momentum=0.9)
    assert torch.equal(stepped["head"], target["head"])
    assert stepped["head"] is not target["head"]
    assert memory == {}


def test_fedavg_with_another_rate_by_hand() -> None:
    start, target = tensors(head=[1.0, 2.0]), tensors(head=[3.0, -2.0])
    stepped, _ = server_step("fedavg", start, target, {}, rate=0.5, momentum=0.0)
    assert stepped["head"].tolist() == [2.0, 0.0]


def test_fedavgm_by_hand() -> None:
    start, target = tensors(head=[1.0]), tensors(head=[3.0])
    stepped, memory = server_step("fedavgm", start, target, {}, rate=0.5, momentum=0.5)
    assert stepped["head"].tolist() == [2.0]  # m = 2
    assert memory["momentum/head"].tolist() == [2.0]
    target = tensors(head=[6.0])  # m = 0.5 * 2 + 4 = 5
    stepped, memory = server_step("fedavgm", stepped, target, memory, rate=0.5, momentum=0.5)
    assert stepped["head"].tolist() == [4.5]
    assert memory["momentum/head"].tolist() == [5.0]
    assert memory["momentum/head"].dtype == torch.float64


def test_fedadam_by_hand() -> None:
    start, target = tensors(head=[1.0]), tensors(head=[3.0])
    stepped, memory = server_step("fedadam", start, target, {}, rate=0.1, momentum=0.9)
    first, second = 0.1 * 2, 0.99 * 1e-6 + 0.01 * 4
    assert memory["momentum/head"].item() == pytest.approx(first, rel=1e-12)
    assert memory["square/head"].item() == pytest.approx(second, rel=1e-12)
    expected = 1 + 0.1 * first / (second**0.5 + 1e-3)
    assert stepped["head"].item() == pytest.approx(expected, rel=1e-6)
    stepped, memory = server_step("fedadam", start, target, memory, rate=0.1, momentum=0.9)
    first, second = 0.9 * first + 0.2, 0.99 * second + 0.04
    expected = 1 + 0.1 * first / (second**0.5 + 1e-3)
    assert stepped["head"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4))
def test_a_target_that_is_the_start_is_a_fixed_point(kind: str, values: list[float]) -> None:
    start = tensors(head=values)
    memory: dict[str, torch.Tensor] = {}
    for _ in range(3):
        stepped, memory = server_step(kind, start, start, memory, rate=0.7, momentum=0.9)
        assert torch.equal(stepped["head"], start["head"])


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_turned_factors_are_taken_as_they_are_and_lose_their_moments(kind: str) -> None:
    start = tensors(head=[1.0], a=[[1.0]], b=[[2.0]])
    target = tensors(head=[3.0], a=[[5.0]], b=[[6.0]])
    _, memory = server_step(kind, start, target, {}, rate=0.5, momentum=0.9)
    assert "momentum/q.lora_a" in memory
    again, kept = server_step(kind, start, target, memory, rate=0.5, momentum=0.9, turned=True)
    assert torch.equal(again["q.lora_a"], target["q.lora_a"])
    assert torch.equal(again["q.lora_b"], target["q.lora_b"])
    assert {name.split("/")[1] for name in kept} == {"head"}
    straight, _ = server_step(kind, start, target, memory, rate=0.5, momentum=0.9)
    assert torch.equal(again["head"], straight["head"])  # the head's moments go on
    assert not torch.equal(straight["q.lora_a"], target["q.lora_a"])


def test_what_did_not_train_keeps_its_memory() -> None:
    start = tensors(head=[1.0], a=[[1.0]], b=[[2.0]])
    memory = {"momentum/q.lora_a": torch.tensor([[4.0]], dtype=torch.float64)}
    target = tensors(head=[3.0], b=[[6.0]])
    stepped, kept = server_step("fedavgm", start, target, memory, rate=1.0, momentum=0.9)
    assert sorted(stepped) == ["head", "q.lora_b"]
    assert kept["momentum/q.lora_a"].item() == 4.0
    assert sorted(kept) == ["momentum/head", "momentum/q.lora_a", "momentum/q.lora_b"]


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone_and_dtypes_stay(kind: str) -> None:
    start, target = tensors(head=[1.0]), {"head": torch.tensor([3.0], dtype=torch.float16)}
    _, memory = server_step(kind, start, target, {}, rate=0.5, momentum=0.5)
    before = {name: tensor.clone() for name, tensor in memory.items()}
    stepped, _ = server_step(kind, start, target, memory, rate=0.5, momentum=0.5)
    assert stepped["head"].dtype == torch.float16
    assert (start["head"].item(), target["head"].item()) == (1.0, 3.0)
    assert all(torch.equal(memory[name], tensor) for name, tensor in before.items())


def test_what_is_no_step_is_refused() -> None:
    head = tensors(head=[1.0])
    with pytest.raises(AggregationError, match=r"'sgd' is not known.*'fedavgm'"):
        server_step("sgd", head, head, {}, rate=1.0, momentum=0.9)
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(AggregationError, match="server_rate"):
            server_step("fedavg", head, head, {}, rate=rate, momentum=0.9)
    with pytest.raises(AggregationError, match="server_momentum"):
        server_step("fedavgm", head, head, {}, rate=1.0, momentum=1.0)
    with pytest.raises(AggregationError, match="'more' is not in the start"):
        server_step("fedavg", head, tensors(more=[1.0]), {}, rate=1.0, momentum=0.9)
    with pytest.raises(AggregationError, match=r"'head' is \(2,\), in the start \(1,\)"):
        server_step("fedavg", head, tensors(head=[1.0, 2.0]), {}, rate=1.0, momentum=0.9)
    wrong = {"momentum/head": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(AggregationError, match=r"'head' is \(1,\), in the memory \(2,\)"):
        server_step("fedavgm", head, head, wrong, rate=1.0, momentum=0.9)


def test_scaffold_by_hand() -> None:
    changes = {"b": tensors(head=[4.0]), "a": tensors(head=[2.0])}
    # Two of four sites answered: c + (4 + 2) / 4.
    assert scaffold_control({}, changes, 4)["head"].tolist() == [1.5]
    assert scaffold_control(tensors(head=[1.0]), changes, 4)["head"].tolist() == [2.5]
    assert changes["a"]["head"].tolist() == [2.0]


@given(st.permutations(range(5)))
def test_scaffold_gives_the_same_bits_in_any_order(order: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    changes = [{"head": torch.randn(7, generator=generator) * 10.0**k} for k in range(5)]
    first = scaffold_control({}, {str(k): changes[k] for k in range(5)}, 9)
    again = scaffold_control({}, {str(k): changes[k] for k in order}, 9)
    assert torch.equal(first["head"], again["head"])


def test_controls_that_do_not_fit_are_refused() -> None:
    one = tensors(head=[1.0])
    with pytest.raises(AggregationError, match="0 changes of controls from 3 sites"):
        scaffold_control({}, {}, 3)
    with pytest.raises(AggregationError, match="2 changes of controls from 1 sites"):
        scaffold_control({}, {"a": one, "b": one}, 1)
    with pytest.raises(
        AggregationError, match="'more' came from one of the sites 'a' and 'b' only"
    ):
        scaffold_control({}, {"a": one, "b": tensors(head=[1.0], more=[1.0])}, 2)
    with pytest.raises(AggregationError, match=r"is \(2,\), in the change of site 'a' \(1,\)"):
        scaffold_control({}, {"a": one, "b": tensors(head=[1.0, 2.0])}, 2)
    with pytest.raises(AggregationError, match="in the control"):
        scaffold_control(tensors(head=[1.0, 2.0]), {"a": one}, 2)
