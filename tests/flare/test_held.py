"""What a site holds between two messages: two rounds of it, and a round done again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_coding import same, trained
from wire import CODED, SETTINGS, Wire, weights

from flap_nvflare.bundle.builders import first_adapter
from flap_nvflare.flare.held import HeldAdapter
from flap_nvflare.settings import Site
from flap_nvflare.training.errors import StateError


def numbered(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((2,), value)}


@pytest.fixture
def held(tmp_path: Path) -> HeldAdapter:
    return HeldAdapter(tmp_path, SETTINGS, Site("A", tmp_path))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_rounds_are_kept(held: HeldAdapter, tmp_path: Path) -> None:
    for index in (0, 1, 3):  # the site sat out round 2
        held.keep(index, numbered(index))
        held.keep_residue(index, numbered(10 + index))
    assert files(tmp_path) == [
        f"{kind}_{index}.safetensors" for kind in ("held", "residue") for index in (1, 3)
    ]
    assert same(held.of(3), numbered(3))
    assert same(held.before(4), numbered(3))
    assert same(held.before(3), numbered(1))
    assert same(held.residue(4), numbered(13))
    assert same(held.residue(3), numbered(11))


def test_a_round_is_done_again_from_the_one_before(held: HeldAdapter, tmp_path: Path) -> None:
    for index in (0, 1, 2):
        held.keep(index, numbered(index))
    # The server was killed in round 1 and goes on from its start: what came later is void.
    assert same(held.before(2), numbered(1))
    held.keep(1, numbered(7))
    assert files(tmp_path) == ["held_1.safetensors"]
    assert same(held.before(2), numbered(7))


def test_at_first_a_site_holds_what_the_seed_draws(held: HeldAdapter, tmp_path: Path) -> None:
    assert same(held.before(0), first_adapter(SETTINGS, Site("A", tmp_path)))
    assert held.residue(0) == {}
    held.keep(0, numbered(1))
    # Also where the first round is done again.
    assert same(held.before(0), first_adapter(SETTINGS, Site("A", tmp_path)))


def test_no_file_is_written_where_nothing_was_lost(held: HeldAdapter, tmp_path: Path) -> None:
    held.keep_residue(0, {})
    assert files(tmp_path) == []


def test_what_is_missing_or_damaged_is_named(held: HeldAdapter, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"held_0\.safetensors"):
        held.of(0)
    (tmp_path / "residue_0.safetensors").write_bytes(b"scan")
    with pytest.raises(StateError, match=r"residue_0\.safetensors"):
        held.residue(1)


@pytest.mark.parametrize("turned", [False, True])
def test_a_message_coded_again_after_a_kill_has_the_same_bytes(
    turned: bool, tmp_path: Path
) -> None:
    wire = Wire(tmp_path, **CODED)
    wire.answer("A", trained(wire.job.downlink.held, 1))
    wire.next_round()
    task = wire.received("A")
    task.set_header("flap_turned", turned)
    update = trained(weights(task), 2)
    sent = weights(wire.sent_up("A", wire.reply("A", task, update)))
    assert (wire.state("A") / "residue_1.safetensors").is_file()
    # Nothing of the first try is counted twice, neither the adapter nor what was lost.
    again = wire.received("A")
    again.set_header("flap_turned", turned)
    assert same(weights(again), weights(task))
    assert weights(wire.sent_up("A", wire.reply("A", again, update))) == sent


def test_what_was_lost_is_sent_later_unless_its_basis_has_turned(tmp_path: Path) -> None:
    sent = {}
    for turned in (False, True):
        folder = tmp_path / str(turned)
        folder.mkdir()
        wire = Wire(folder, **CODED)
        wire.answer("A", trained(wire.job.downlink.held, 1))
        wire.next_round()
        task = wire.received("A")
        task.set_header("flap_turned", turned)
        still = weights(task)  # the site has learned nothing: all that it sends is what was lost
        wire.answer("A", still, task)
        decoded = wire.aggregator._round.result(2)[0].tensors  # of one site: its own update
        sent[turned] = {name for name in still if not torch.equal(decoded[name], still[name])}
    assert any(".lora_" in name for name in sent[False])
    assert any("mask_tokens" in name for name in sent[True])
    residue = {}
    for turned in (False, True):
        path = tmp_path / str(turned) / "A" / wire.job.run / "A"
        residue[turned] = HeldAdapter(path, wire.federation, Site("A", path)).residue(2)
    assert all(not t.any() for name, t in residue[True].items() if ".lora_" in name)
    assert any(t.any() for name, t in residue[False].items() if ".lora_" in name)
