"""The filters that code messages: both ways, in and out of step, damaged and private."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import make_reply
from wire import CODED, UPLOAD, Tensors, Wire, over_the_wire, weights

from flap_nvflare.adapter.container import CodecError, names
from flap_nvflare.adapter.links import Uplink
from flap_nvflare.flare import messages
from flap_nvflare.flare.coding import (
    DecodeAdapter,
    DecodeUpdate,
    EncodeAdapter,
    EncodeUpdate,
    PrivacyFilter,
)


def trained(start: Tensors, seed: int, size: float = 0.1) -> Tensors:
    """An update: every number has moved a little, as training moves it."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=random)
        for name, tensor in sorted(start.items())
    }


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---- plain ---------------------------------------------------------------------------------
def test_without_stages_all_filters_let_messages_pass(tmp_path: Path) -> None:
    wire = Wire(tmp_path)
    task = wire.task()
    assert EncodeAdapter().process(task, wire.server.peer("A")) is task
    site = wire.site_contexts["A"]
    assert DecodeAdapter().process(task, site) is task
    update = trained(dict(wire.job.state.tensors), 1)
    reply = wire.reply("A", task, update)
    assert PrivacyFilter().process(reply, site) is reply
    assert EncodeUpdate().process(reply, site) is reply
    assert DecodeUpdate().process(reply, wire.server.peer("A")) is reply
    assert same(weights(reply), update)
    assert not list(tmp_path.rglob("*.safetensors"))  # and nothing is remembered


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
def test_the_ledger_has_the_serialised_bytes(coded: bool, tmp_path: Path) -> None:
    wire = Wire(tmp_path, **(CODED if coded else {}))
    down = wire.sent_down("A")
    up = wire.sent_up("A", wire.reply("A", wire.received("A", down), wire.job.downlink.held))
    assert wire.accept("A", up)
    ledger = wire.job.ledger
    assert ledger.bytes(0, "A", "down") == messages.serialised_bytes(over_the_wire(down))
    assert ledger.bytes(0, "A", "up") == messages.serialised_bytes(over_the_wire(up))
    assert ledger.sites(0) == ["A"]
    plain = wire.job.spec.bytes
    for way in ("up", "down"):
        if coded:
            assert ledger.bytes(0, "A", way) < plain / 20
        else:
            assert plain < ledger.bytes(0, "A", way)


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
def test_what_only_the_sites_own_filters_need_is_taken_off(coded: bool, tmp_path: Path) -> None:
    wire = Wire(tmp_path, **(CODED if coded else {}))
    reply = wire.reply("A", wire.received("A"), dict(wire.job.downlink.held))
    assert messages.handed_on(reply) is not None
    sent = wire.sent_up("A", reply)
    for name in (messages.FEDERATION, messages.RUN, messages.TURNED):
        assert sent.get_header(name) is None


# ---- coded ---------------------------------------------------------------------------------
def test_the_first_round_is_a_difference_to_what_the_seed_draws(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    sent = wire.sent_down("A")
    assert set(weights(sent)) == {messages.CODED}
    # Nothing but a name of the adapter that the site draws by itself.
    assert names(weights(sent)[messages.CODED]) == []
    assert len(weights(sent)[messages.CODED]) < 400
    meta = messages.read_dxo(sent, DataKind.WEIGHTS).meta
    assert meta[messages.SPEC]["shapes"] == {}

    received = wire.received("A", sent)
    assert same(weights(received), dict(wire.job.state.tensors))
    found = messages.read_dxo(received, DataKind.WEIGHTS).meta[messages.SPEC]
    assert found == wire.job.spec.to_dict()


def test_a_site_that_draws_another_adapter_refuses_the_first_message(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    sent = wire.sent_down("A")
    settings = {**sent.get_header(messages.FEDERATION), "seed": wire.federation.seed + 1}
    sent.set_header(messages.FEDERATION, settings)
    with pytest.raises(CodecError, match="difference to"):
        wire.received("A", sent)


def test_an_update_arrives_as_its_link_says(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    task = wire.received("A")
    update = trained(weights(task), 1)
    sent = wire.sent_up("A", wire.reply("A", task, update))
    link = Uplink(UPLOAD)
    blob, arrived = link.send(update, dict(wire.job.downlink.held), turned=False)
    assert weights(sent) == {messages.CODED: blob}
    decoded = DecodeUpdate().process(over_the_wire(sent), wire.server.peer("A"))
    assert same(weights(decoded), arrived)
    assert not same(arrived, update)  # a tenth of the numbers, in four bits
    assert wire.accept("A", sent)
    assert list(wire.job.reports) == ["A"]


def test_two_rounds_with_a_site_in_step_and_one_out_of_step(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    for _ in range(2):  # B sits out two rounds
        wire.answer("A", trained(wire.job.downlink.held, wire.round_index))
        wire.next_round()
    difference, whole = wire.sent_down("A"), wire.sent_down("B")
    assert len(weights(difference)[messages.CODED]) < wire.job.spec.bytes / 20
    assert len(weights(whole)[messages.CODED]) > wire.job.spec.bytes / 2
    held = wire.job.downlink.held
    assert not same(held, dict(wire.job.state.tensors))
    assert same(weights(wire.received("A", difference)), held)
    assert same(weights(wire.received("B", whole)), held)
    for site in ("A", "B"):
        wire.answer(site, trained(held, ord(site)))
    wire.next_round()
    for site in ("A", "B"):  # both have answered, and both are in step
        sent = wire.sent_down(site)
        assert len(weights(sent)[messages.CODED]) < wire.job.spec.bytes / 20
        assert same(weights(wire.received(site, sent)), wire.job.downlink.held)


def test_a_difference_to_what_the_site_does_not_hold_is_refused(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    for _ in range(2):
        wire.answer("A", trained(wire.job.downlink.held, wire.round_index))
        wire.next_round()
    with pytest.raises(CodecError, match="expected one to"):
        wire.received("B", wire.sent_down("A"))
    assert not list(wire.state("B").glob("held_*"))


def test_an_update_that_does_not_count_leaves_its_site_out_of_step(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    wire.answer("A", trained(wire.job.downlink.held, 1))
    task = wire.received("B")
    false = trained(weights(task), 2)
    reply = wire.reply("B", task, false)
    reply["DXO"]["meta"][messages.WEIGHT] = -1.0
    assert not wire.accept("B", wire.sent_up("B", reply))
    wire.next_round()
    wire.answer("A", trained(wire.job.downlink.held, 3))
    assert len(weights(wire.sent_down("B"))[messages.CODED]) > wire.job.spec.bytes / 2
    assert same(weights(wire.received("B")), wire.job.downlink.held)


def test_the_message_that_all_sites_share_stays_as_it_is(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    task = wire.task()
    sent = EncodeAdapter().process(task, wire.server.peer("A"))
    assert sent is not task
    assert same(weights(task), dict(wire.job.state.tensors))
    assert sent.get_header(messages.RUN) == task.get_header(messages.RUN)


def test_a_site_of_its_own_rank_sends_in_that_rank(tmp_path: Path) -> None:
    wire = Wire(tmp_path, site_ranks={"B": 1}, **CODED)
    task = wire.received("B")
    expected = wire.job.expected("B", 0)
    update = {name: torch.zeros(shape) for name, shape in expected.shapes.items()}
    assert any(update[name].shape != weights(task)[name].shape for name in update)
    wire.answer("B", update, task)
    assert list(wire.job.reports) == ["B"]


def test_only_the_uploads_stages_code_only_the_way_up(tmp_path: Path) -> None:
    wire = Wire(tmp_path, upload=UPLOAD)
    task = wire.received("A")
    assert same(weights(task), dict(wire.job.state.tensors))
    sent = wire.answer("A", trained(weights(task), 1), task)
    assert set(weights(sent)) == {messages.CODED}


def test_control_variates_go_beside_the_coded_bytes(tmp_path: Path) -> None:
    wire = Wire(tmp_path, optimizer="scaffold", **CODED)
    task = wire.received("A")
    control = trained({name: torch.zeros_like(t) for name, t in weights(task).items()}, 5)
    sent = wire.sent_up("A", wire.reply("A", task, trained(weights(task), 1), control))
    assert set(weights(sent)) == {messages.CODED, *(f"control/{name}" for name in control)}
    assert wire.accept("A", sent)
    wire.next_round()
    down = weights(wire.received("A"))
    # Half of A's change: one of two sites has changed its own.
    assert all(torch.allclose(down[f"control/{n}"], one / 2) for n, one in control.items())


# ---- damaged -------------------------------------------------------------------------------
def test_a_damaged_update_is_refused_by_name(tmp_path: Path) -> None:
    for number, damage in enumerate(
        (lambda blob: blob[: len(blob) // 2], lambda blob: b"", lambda blob: "scan")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        wire = Wire(folder, **CODED)
        wire.answer("B", trained(wire.job.downlink.held, 2))
        task = wire.received("A")
        sent = wire.sent_up("A", wire.reply("A", task, trained(weights(task), 1)))
        blob = weights(sent)[messages.CODED]
        sent["DXO"]["data"][messages.CODED] = damage(blob)
        size = messages.serialised_bytes(sent)
        assert not wire.accept("A", sent)
        (refusal,) = wire.job.refused
        assert (refusal.site, refusal.round) == ("A", 0)
        assert "unreadable message: CodecError" in refusal.reason
        assert wire.job.ledger.bytes(0, "A", "up") == size
        wire.next_round()  # B's counts


def test_a_damaged_adapter_is_refused_at_the_site(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    sent = wire.sent_down("A")
    sent["DXO"]["data"][messages.CODED] = weights(sent)[messages.CODED][:-9]
    context = wire.site_contexts["A"]
    with pytest.raises(CodecError):
        DecodeAdapter().process(over_the_wire(sent), context)
    assert not list(wire.state("A").glob("held_*"))
    assert same(weights(wire.received("A")), wire.job.downlink.held)  # a whole one may follow


def test_an_update_of_another_round_is_refused_by_its_reference(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    old = wire.answer("A", trained(wire.job.downlink.held, 1))
    wire.next_round()
    wire.answer("A", trained(wire.job.downlink.held, 2))
    wire.next_round()
    old["DXO"]["meta"][messages.ROUND] = wire.round_index
    assert not wire.accept("A", old)
    assert "CodecError: the message is a difference to" in wire.job.refused[0].reason


def test_error_replies_and_metrics_pass_all_filters(tmp_path: Path) -> None:
    wire = Wire(tmp_path, dp_clip=1.0, **CODED)
    scores = DXO(DataKind.METRICS, data={"last": 1.0}).to_shareable()
    for sent in (make_reply(ReturnCode.EXECUTION_EXCEPTION), scores):
        for one in (PrivacyFilter(), EncodeUpdate()):
            assert one.process(sent, wire.site_contexts["A"]) is sent
        assert DecodeUpdate().process(sent, wire.server.peer("A")) is sent
