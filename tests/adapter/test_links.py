"""What each end of the two ways remembers: who is in step, and what coding has lost."""

from __future__ import annotations

import pytest
import torch
from wire_cases import Tensors, normal

from flap_nvflare.adapter.channel import Reference
from flap_nvflare.adapter.container import CodecError, read_header
from flap_nvflare.adapter.links import Downlink, Uplink, arrived
from flap_nvflare.adapter.stages import StageError

DOWN = ("difference", "int8", "deflate")
UP = ("difference", "feedback", "int4", "deflate")
NAMES = sorted(normal())


def equal(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def near(first: Tensors, second: Tensors, bound: float) -> bool:
    return all(torch.allclose(first[n], second[n], rtol=0, atol=bound) for n in first)


def message(link: Downlink, site: str) -> bytes:
    found = link.message(site)
    assert found is not None
    return found


def test_in_the_first_round_every_site_gets_a_difference_to_what_it_drew() -> None:
    first, wanted = normal(0), normal(1)
    link = Downlink(DOWN, first)
    link.prepare(wanted)
    for site in ("a", "b"):
        assert equal(arrived(message(link, site), DOWN, "down", first, NAMES), link.held)
    assert near(link.held, wanted, 0.05)
    assert not equal(link.held, wanted)
    assert read_header(message(link, "a")).reference == Reference.of(first).sha256


def test_a_site_that_did_not_answer_gets_the_adapter_whole() -> None:
    link = Downlink(DOWN, normal(0))
    link.prepare(normal(1))
    before = dict(link.held)
    link.answered("a")
    link.prepare(normal(2))
    coded, whole = message(link, "a"), message(link, "b")
    assert equal(arrived(coded, DOWN, "down", before, NAMES), link.held)
    # What the absent one holds does not matter.
    assert equal(arrived(whole, DOWN, "down", normal(9), NAMES), link.held)
    assert len(coded) < len(whole)
    with pytest.raises(CodecError, match="send it whole"):
        arrived(coded, DOWN, "down", normal(0), NAMES)
    link.answered("b")
    link.prepare(normal(3))
    assert message(link, "b") != message(link, "a")  # now a was away
    assert arrived(message(link, "a"), DOWN, "down", normal(9), NAMES)


def test_a_restored_downlink_trusts_nobody_to_be_in_step() -> None:
    link = Downlink(DOWN, normal(0))
    link.prepare(normal(1))
    link.answered("a")
    again = Downlink(DOWN, normal(0))
    again.restore(link.stored())
    assert equal(again.held, link.held)
    for one in (link, again):
        one.prepare(normal(2))
    assert equal(again.held, link.held)
    assert again.message("a") == link.message("b") != link.message("a")


def test_without_stages_the_adapter_goes_as_it_is() -> None:
    link = Downlink((), normal(0))
    link.prepare(normal(1))
    assert link.message("a") is None
    assert equal(link.held, normal(1))
    assert link.stored() == {}
    link.restore({})
    assert equal(link.held, normal(1))


def test_a_downlink_refuses_feedback() -> None:
    with pytest.raises(StageError, match="twice"):
        Downlink(UP)


def sent(link: Uplink, update: Tensors, held: Tensors, turned: bool = False) -> Tensors:
    """The update at the server, which must be what the site expects there."""
    blob, expected = link.send(update, held, turned)
    assert blob is not None
    there = arrived(blob, UP, "up", held, sorted(update))
    assert equal(there, expected)
    return there


def test_what_was_lost_is_added_to_the_next_update() -> None:
    link, zero = Uplink(UP), {name: torch.zeros_like(t) for name, t in normal().items()}
    total, asked = dict(zero), dict(zero)
    for seed in (1, 2, 3):
        got = sent(link, normal(seed), zero)
        total = {name: total[name] + got[name] for name in got}
        asked = {name: asked[name] + normal(seed)[name] for name in got}
        lost = link.stored()
        assert any(bool(tensor.any()) for tensor in lost.values())
        assert near({name: total[name] + lost[name] for name in lost}, asked, 1e-5)


def test_what_was_lost_of_turned_factors_is_forgotten() -> None:
    held, update = normal(0), normal(2)
    for turned in (False, True):
        link = Uplink(UP)
        sent(link, normal(1), held)
        before = link.stored()
        there, after = sent(link, update, held, turned), link.stored()
        for name in ("q.lora_a", "q.lora_b", "head.scale"):
            assert before[name].any()
            forgotten = turned and name.startswith("q.")
            asked = update[name] - held[name] + (0 if forgotten else before[name])
            torch.testing.assert_close(
                there[name] - held[name] + after[name], asked, rtol=0, atol=1e-5
            )


def test_names_that_change_by_turns_keep_what_they_lost() -> None:
    link, held = Uplink(UP), normal(0)
    b = {name: tensor for name, tensor in normal(1).items() if name != "q.lora_a"}
    a = {name: tensor for name, tensor in normal(2).items() if name != "q.lora_b"}
    sent(link, b, held)
    lost = link.stored()["q.lora_b"]
    assert lost.any()
    assert "q.lora_a" not in link.stored()
    sent(link, a, held)
    assert torch.equal(link.stored()["q.lora_b"], lost)  # it did not travel
    there = sent(link, b, held)
    assert not torch.equal(there["q.lora_b"], sent(Uplink(UP), b, held)["q.lora_b"])


def test_a_restored_uplink_goes_on_with_the_same_bytes() -> None:
    link, again, held = Uplink(UP), Uplink(UP), normal(0)
    sent(link, normal(1), held)
    again.restore(link.stored())
    assert again.send(normal(2), held, False)[0] == link.send(normal(2), held, False)[0]


def test_without_feedback_or_stages_there_is_no_residue() -> None:
    link = Uplink(("int4",))
    blob, there = link.send(normal(1), normal(0), turned=True)
    assert blob is not None
    assert not equal(there, normal(1))
    assert link.stored() == {}
    plain = Uplink(())
    assert plain.send(normal(1), normal(0), turned=False)[0] is None
    assert equal(plain.send(normal(1), normal(0), turned=False)[1], normal(1))


def test_the_reference_is_of_the_names_that_travel() -> None:
    held, update = normal(0), {"q.lora_b": normal(1)["q.lora_b"]}
    blob, there = Uplink(UP).send(update, held, False)
    assert blob is not None
    # Other tensors of the adapter may differ at the two ends; these may not.
    moved = {**held, "q.lora_a": held["q.lora_a"] + 1}
    assert equal(arrived(blob, UP, "up", moved, ["q.lora_b"]), there)
    wrong = {**held, "q.lora_b": held["q.lora_b"] + 1}
    with pytest.raises(CodecError, match="send it whole"):
        arrived(blob, UP, "up", wrong, ["q.lora_b"])
    with pytest.raises(CodecError):
        arrived(blob, UP, "up", held, ["q.lora_a"])
    with pytest.raises(CodecError):
        arrived(blob[:-1], UP, "up", held, ["q.lora_b"])


@pytest.mark.parametrize("stages", [("int8",), ("int4", "deflate"), ("fp16",)], ids=str)
def test_a_lossy_way_without_differences_gives_all_sites_the_same_bits(
    stages: tuple[str, ...],
) -> None:
    first = {"x": torch.zeros(300)}
    link = Downlink(stages, first)
    for seed in range(3):
        link.prepare({"x": torch.randn(300, generator=torch.Generator().manual_seed(seed))})
        for site in ("in step", "late"):
            message = link.message(site)
            assert message is not None
            found = arrived(message, stages, "down", link.held, link.held)
            assert torch.equal(found["x"], link.held["x"])
        link.answered("in step")
