from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import LISTS, SHAPES, Tensors, normal

from flap_nvflare.adapter.channel import Reference, Sender, receive
from flap_nvflare.adapter.codec import bound
from flap_nvflare.adapter.container import CodecError, read_header
from flap_nvflare.adapter.stages import parse

DIFFERENCES = [texts for texts in LISTS if "difference" in texts]
FEEDBACK = [[t[0], "feedback", *t[1:]] for t in DIFFERENCES if set(t) - {"difference", "deflate"}]
TOP = ["difference", "feedback", "top_k=0.1", "sign", "deflate"]


def equal(first: Tensors, second: Tensors) -> bool:
    same = first.keys() == second.keys()
    return same and all(torch.equal(first[name], second[name]) for name in first)


def plus(first: Tensors, second: Tensors) -> Tensors:
    return {name: first[name] + second[name] for name in first}


@given(st.sampled_from([[], ["int8"], *DIFFERENCES, *FEEDBACK]), st.integers(0, 99))
@settings(max_examples=120, deadline=None)
def test_the_sender_knows_what_the_receiver_holds(texts: list[str], seed: int) -> None:
    pipeline = parse(texts)
    sender = Sender(pipeline, SHAPES)
    for index in range(3):
        reference = Reference.of(normal(seed + index))
        update = plus(normal(seed + index), normal(seed + 50 + index, 0.1))
        sent = sender.encode(update, reference)
        assert equal(receive(sent.blob, pipeline, SHAPES, reference), sent.held)


@given(st.sampled_from(FEEDBACK), st.integers(1, 6), st.integers(0, 99), st.integers(-20, 20))
@settings(max_examples=120, deadline=None)
def test_what_was_sent_and_the_residue_are_what_was_asked(
    texts: list[str], rounds: int, seed: int, power: int
) -> None:
    pipeline = parse(texts)
    sender = Sender(pipeline, SHAPES)
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    reference = Reference.of(zero)  # so that what is held is what was sent
    sent, asked = (
        {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    for index in range(rounds):
        update = normal(seed + index, 2.0**power)
        held = sender.encode(update, reference).held
        sent, asked = plus(sent, held), plus(asked, update)
    residue = sender.state()
    for name in SHAPES:
        error = (sent[name] + residue[name].double() - asked[name]).abs()
        assert bool((error <= 2.0**power * rounds**2 * 1e-5).all()), name


def test_feedback_sends_every_number_in_the_end() -> None:
    # The same difference again and again: on average it is sent as it is.
    pipeline, rounds = parse(TOP), 200
    sender, plain = Sender(pipeline, SHAPES), Sender(parse([TOP[0], *TOP[2:]]), SHAPES)
    zero = Reference.of({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    update = normal(3)
    norm = sum(float(t.square().sum()) for t in update.values()) ** 0.5

    def error(sender: Sender) -> float:
        total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for _ in range(rounds):
            total = plus(total, sender.encode(update, zero).held)
        off = sum(float((total[n] / rounds - update[n]).square().sum()) for n in update) ** 0.5
        return off / norm

    assert error(sender) < 0.1
    assert error(plain) > 0.5


@pytest.mark.parametrize("texts", [["difference", "int4"], ["difference", "top_k=0.1", "sign"]])
def test_on_the_way_down_what_was_lost_comes_with_the_next_difference(texts: list[str]) -> None:
    # The server's adapter stays; what the sites hold comes nearer to it round by round.
    pipeline = parse(texts, "down")
    sender, wanted = Sender(pipeline, SHAPES), normal(1)
    held = receive(sender.encode(normal(0), None).blob, pipeline, SHAPES)
    assert equal(held, normal(0))
    errors = []
    for _ in range(40):
        reference = Reference.of(held)
        limits = bound({n: wanted[n] - held[n] for n in held}, pipeline)
        held = receive(sender.encode(wanted, reference).blob, pipeline, SHAPES, reference)
        off = {name: (held[name].double() - wanted[name]).abs() for name in held}
        assert all(bool((off[name] <= limits[name] + 1e-6).all()) for name in off)
        errors.append(max(float(tensor.max()) for tensor in off.values() if tensor.numel()))
    assert errors[-1] < 0.05 * errors[0]
    assert sender.state() == {}


def test_a_difference_to_another_reference_is_refused() -> None:
    pipeline = parse(TOP)
    mine, other = Reference.of(normal(0)), Reference.of(normal(1))
    blob = Sender(pipeline, SHAPES).encode(normal(2), mine).blob
    assert read_header(blob).reference == mine.sha256
    with pytest.raises(CodecError, match="send it whole"):
        receive(blob, pipeline, SHAPES, other)
    with pytest.raises(CodecError, match="holds no adapter yet"):
        receive(blob, pipeline, SHAPES)


def test_a_whole_message_is_exact_and_taken_at_any_time() -> None:
    pipeline, tensors = parse(TOP), normal(2)
    sent = Sender(pipeline, SHAPES).encode(tensors, None)
    assert read_header(sent.blob).stages == ("deflate",)
    assert equal(sent.held, tensors)
    for reference in (None, Reference.of(normal(0))):
        assert equal(receive(sent.blob, pipeline, SHAPES, reference), tensors)


def test_a_whole_message_takes_the_residue_along() -> None:
    sender = Sender(parse(TOP), SHAPES)
    sender.encode(normal(2), Reference.of(normal(0)))
    lost = sender.state()
    assert any(tensor.any() for tensor in lost.values())
    assert equal(sender.encode(normal(3), None).held, plus(normal(3), lost))
    assert not any(tensor.any() for tensor in sender.state().values())


def test_a_restored_sender_goes_on_with_the_same_bytes() -> None:
    pipeline, reference = parse(TOP), Reference.of(normal(0))
    first, second = Sender(pipeline, SHAPES), Sender(pipeline, SHAPES)
    first.encode(normal(1), reference)
    before = first.state()
    second.restore(before)
    assert first.encode(normal(2), reference).blob == second.encode(normal(2), reference).blob
    # A message that was never delivered is made again from the state before it.
    blob = second.encode(normal(3), reference).blob
    second.restore(first.state())
    assert second.encode(normal(3), reference).blob == blob


def test_a_reset_forgets_the_named_tensors_alone() -> None:
    sender = Sender(parse(TOP), SHAPES)
    sender.encode(normal(1), Reference.of(normal(0)))
    kept = sender.state()["q.lora_b"]
    sender.reset(["q.lora_a"])
    assert not sender.state()["q.lora_a"].any()
    assert torch.equal(sender.state()["q.lora_b"], kept)
    with pytest.raises(CodecError, match="no tensor 'q'"):
        sender.reset(["q"])
    Sender(parse(["int4"]), SHAPES).reset(["q.lora_a"])


def test_a_reference_and_a_state_are_copies() -> None:
    tensors = normal(0)
    reference = Reference.of(tensors)
    sender = Sender(parse(TOP), SHAPES)
    sender.encode(normal(1), reference)
    tensors["head.scale"].fill_(9.0)
    sender.state()["q.lora_a"].fill_(9.0)
    assert equal(dict(reference.tensors), normal(0))
    assert not bool((sender.state()["q.lora_a"] == 9.0).any())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q.lora_a": torch.zeros(50, 3)}, r"'q.lora_a' has shape \(50, 3\), expected \(3, 50\)"),
        ({"more": torch.zeros(1)}, r"'more' has shape \(1,\), expected None"),
        ({"q.lora_a": torch.full((3, 50), torch.nan)}, "not finite|no finite"),
        ({"q.lora_a": torch.zeros(3, 50).double()}, "float32"),
    ],
)
def test_wrong_tensors_are_refused_and_change_nothing(change: Tensors, reason: str) -> None:
    sender, reference = Sender(parse(TOP), SHAPES), Reference.of(normal(0))
    sender.encode(normal(1), reference)
    before = sender.state()
    for attempt in (
        lambda: sender.encode({**normal(2), **change}, reference),
        lambda: sender.restore({**before, **change}),
    ):
        with pytest.raises(CodecError, match=reason):
            attempt()
        assert equal(sender.state(), before)


def test_a_state_of_another_sender_is_refused() -> None:
    with pytest.raises(CodecError, match="the state"):
        Sender(parse(["int4"]), SHAPES).restore(normal())
    with pytest.raises(CodecError, match="the state"):
        Sender(parse(TOP), SHAPES).restore({})


def test_a_sum_beyond_float32_is_refused() -> None:
    pipeline = parse(["difference"])
    shapes, sha256 = {"w": (1,)}, "ab" * 32
    zero, huge = (Reference({"w": torch.tensor([value])}, sha256) for value in (0.0, 3.3e38))
    blob = Sender(pipeline, shapes).encode({"w": torch.tensor([8e37])}, zero).blob
    with pytest.raises(CodecError, match="with its difference"):
        receive(blob, pipeline, shapes, huge)
