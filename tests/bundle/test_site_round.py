"""A site's round under every kind of rule and optimiser, on scans of a few slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_cards import rule_cards  # noqa: F401
from safetensors.torch import load_file

from flap_nvflare.adapter.update import UpdateError
from flap_nvflare.bundle.round_files import RoundFolder
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.sam.tuning import LORA_A, LORA_B, LORA_CORE
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.site_round import SiteRound
from flap_nvflare.training.work import SiteWork

pytestmark = pytest.mark.usefixtures("rule_cards")
Tensors = dict[str, torch.Tensor]
Make = Callable[..., SiteRound]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")  # prepares each scan once for all tests


@pytest.fixture
def make(federation: Federation, site: Site, tmp_path: Path, cache: Path) -> Make:
    """Makes a site's round in a folder of its own, from changed settings."""

    def made(folder: str = "site", **changes: Any) -> SiteRound:
        settings = {"rounds": 3, "local_epochs": 1, **changes}
        where = dataclasses.replace(site, state_dir=cache)
        work = build_work(dataclasses.replace(federation, **settings), where)
        return SiteRound(work, tmp_path / folder)

    return made


def sent_down(work: SiteWork) -> Tensors:
    """The first adapter as a server would send it."""
    return {n: t for n, t in work.adapter().items() if work.parts.down(n)}


def answered(before: Tensors, update: Tensors) -> Tensors:
    """What a server of this one site sends next: what came up, and the rest as it was."""
    return {**before, **update}


def one_round(site: SiteRound, down: Tensors, index: int, **more: Any) -> Tensors:
    site.receive(down, round_index=index, turned=False, **more)
    site.train(index)
    update = site.update()
    site.save(index)
    return update


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def apart(one: Tensors, other: Tensors) -> float:
    return sum(float((one[n] - other[n]).square().sum()) for n in one) ** 0.5


def with_end(tensors: Tensors, *ends: str) -> set[str]:
    return {name for name in tensors if name.endswith(ends)}


def test_plain_rounds_are_those_of_the_workflow(
    make: Make, federation: Federation, site: Site, tmp_path: Path
) -> None:
    plain = build_work(dataclasses.replace(federation, rounds=3), site)
    ours = make(local_epochs=2)
    down = sent_down(ours.work)
    for index, turned in ((0, False), (1, True)):
        ours.receive(down, round_index=index, turned=turned)
        plain.load_adapter(down)
        if index:
            plain.load_state(tmp_path / "moments.safetensors", reset_factors=turned)
        report, expected = ours.train(index), plain.train(index)
        assert dataclasses.replace(report, seconds=0) == dataclasses.replace(expected, seconds=0)
        ours.save(index)
        plain.save_state(tmp_path / "moments.safetensors")
        down = ours.update()
        assert same(down, plain.adapter())
        assert ours.work.spec(index) == ours.work.spec_down() == plain.spec_whole()
        moments = ours.memory.path("moments", index).read_bytes()
        assert moments == (tmp_path / "moments.safetensors").read_bytes()
    assert ours.control_change() == {}
    files = {path.name for path in (tmp_path / "site").iterdir()}
    assert files == {"adapter.safetensors", "moments_0.safetensors", "moments_1.safetensors"}
    tensors, spec = ours.last_adapter()
    assert same(tensors, down)
    assert spec == ours.work.spec()


def test_factors_that_train_by_turns_leave_the_other_to_the_bit(make: Make) -> None:
    site = make(rule="by_turns")
    down = sent_down(site.work)
    for index, moves, rests in ((0, LORA_B, LORA_A), (1, LORA_A, LORA_B), (2, LORA_B, LORA_A)):
        update = one_round(site, down, index)
        after = site.work.adapter()
        assert not with_end(update, rests)
        assert with_end(update, moves) == with_end(after, moves)
        assert site.work.spec(index).shapes == {n: tuple(t.shape) for n, t in update.items()}
        for name in with_end(after, LORA_A, LORA_B):
            assert torch.equal(after[name], down[name]) is name.endswith(rests), name
        assert any(".lora_" not in name for name in update)
        down = answered(down, update)
    assert site.work.spec().shapes.keys() == site.work.spec_down().shapes.keys() == down.keys()
    assert same(site.last_adapter()[0], down)


@pytest.mark.parametrize(
    ("rule", "trains", "rests"),
    [("only_b", LORA_B, (LORA_A,)), ("only_core", LORA_CORE, (LORA_A, LORA_B))],
)
def test_fixed_factors_never_travel_and_never_change(
    make: Make, rule: str, trains: str, rests: tuple[str, ...]
) -> None:
    site = make(rule=rule)
    fixed, sha256 = site.work.fixed(), site.fixed_sha256()
    assert with_end(fixed, *rests) == fixed.keys()
    down = sent_down(site.work)
    update = one_round(site, down, 0)
    assert not with_end(update, *rests)
    assert update.keys() == down.keys() == site.work.spec(0).shapes.keys()
    assert all(not torch.equal(update[n], down[n]) for n in with_end(update, trains))
    assert same(site.work.fixed(), fixed)
    assert make(rule=rule).fixed_sha256() == sha256 == site.fixed_sha256()
    assert make(rule=rule, seed=4).fixed_sha256() != sha256


@pytest.mark.parametrize(
    ("changes", "is_private"),
    [
        ({"rule": "private_b"}, lambda name: name.endswith(LORA_B)),
        ({"personal": "head"}, lambda name: ".lora_" not in name),
    ],
)
def test_what_is_private_stays_and_comes_back(
    make: Make, changes: dict[str, str], is_private: Callable[[str], bool]
) -> None:
    site = make(**changes)
    fresh = site.work.adapter()
    down = sent_down(site.work)
    assert {name for name in fresh if is_private(name)} == fresh.keys() - down.keys()
    update = one_round(site, down, 0)
    kept = {n: t for n, t in site.work.adapter().items() if is_private(n)}
    assert update.keys() == down.keys()
    assert kept
    assert not any(torch.equal(kept[name], fresh[name]) for name in kept)
    assert site.last_adapter()[0].keys() == down.keys()
    again = make(**changes)  # another process; it missed round 1 as well
    again.receive(down, round_index=2, turned=False)
    assert same({n: t for n, t in again.work.adapter().items() if is_private(n)}, kept)
    assert not again.work.optimizer.state
    newcomer = make("elsewhere", **changes)
    newcomer.receive(down, round_index=2, turned=False)
    assert same(newcomer.work.adapter(), fresh)


def test_a_smaller_rank_takes_the_first_rows_and_columns(make: Make) -> None:
    site, full = make(site_ranks={"A": 1}), make("full", site_ranks={"B": 1})
    down = {n: torch.randn_like(t) for n, t in sent_down(full.work).items()}
    assert full.work.spec() == full.work.spec_down() == site.work.spec_down()
    assert (site.work.spec().rank, site.work.spec_down().rank) == (1, 2)
    site.receive(down, round_index=0, turned=True)
    for name, tensor in site.work.adapter().items():
        expected = down[name]
        if name.endswith(LORA_A):
            expected = expected[:1]
        elif name.endswith(LORA_B):
            expected = expected[:, :1]
        assert torch.equal(tensor, expected), name
    site.train(0)
    assert {n: tuple(t.shape) for n, t in site.update().items()} == site.work.spec(0).shapes
    with pytest.raises(UpdateError, match=r"lora_a is \(1, \d+\), expected \(2, \d+\)"):
        site.receive(site.update(), round_index=1, turned=True)


def offset_of(work: SiteWork) -> Tensors:
    stems = [n.removesuffix(LORA_A) for n in work.parameters if n.endswith(LORA_A)]
    draw = torch.Generator().manual_seed(0)
    found = {}
    for stem in stems:
        a, b = work.parameters[stem + LORA_A], work.parameters[stem + LORA_B]
        found[f"{stem}.offset_a"] = torch.randn(3, a.shape[1], generator=draw)
        found[f"{stem}.offset_b"] = 0.05 * torch.randn(b.shape[0], 3, generator=draw)
    return found


def test_an_offset_holds_for_its_round_and_never_goes_up(make: Make) -> None:
    site, plain = make(rule="moves_base"), make("plain", rule="moves_base")
    down, offset = sent_down(site.work), offset_of(site.work)
    base = {n: t.clone() for n, t in site.work.network.state_dict().items()}
    update = one_round(site, down, 0, offset=offset)
    assert update.keys() == down.keys()
    changed = {n for n, t in site.work.network.state_dict().items() if not torch.equal(t, base[n])}
    assert changed - update.keys() == {
        n.rpartition(".")[0].rpartition(".")[0] + ".weight" for n in offset
    }
    assert not same(update, one_round(plain, down, 0))
    site.receive(down, round_index=1, turned=False)
    assert same(dict(site.work.network.state_dict()), base)


def test_the_base_of_an_offset_is_the_one_in_full_precision(make: Make) -> None:
    full, half = (make(p, rule="moves_base", precision=p) for p in ("fp32", "bf16"))
    down, offset = sent_down(full.work), offset_of(full.work)
    weights = []
    for site in (full, half):
        site.receive(down, round_index=0, turned=False, offset=offset)
        weights.append(site.work.network.get_parameter("image_encoder.blocks.0.attn.qkv.weight"))
    assert weights[1].dtype == torch.bfloat16
    assert torch.equal(weights[0].to(torch.bfloat16), weights[1])


def test_the_proximal_term_keeps_a_site_near_its_start(make: Make) -> None:
    ways = {}
    for name, changes in {
        "plain": {},
        "none": {"optimizer": "fedprox", "proximal_weight": 0.0},
        "factors": {"optimizer": "fedprox", "proximal_weight": 50.0},
        "products": {"optimizer": "fedprox", "proximal_weight": 50.0, "proximal_on": "products"},
    }.items():
        site = make(name, local_epochs=2, **changes)
        down = sent_down(site.work)
        ways[name] = one_round(site, down, 0), down
    assert same(ways["plain"][0], ways["none"][0])
    for name in ("factors", "products"):
        assert apart(*ways[name]) < 0.8 * apart(*ways["plain"])
    assert not same(ways["factors"][0], ways["products"][0])


def test_scaffold_sends_the_change_of_its_mean_gradient(make: Make) -> None:
    site = make(optimizer="scaffold", augment=False)
    down = sent_down(site.work)
    raw: list[Tensors] = []
    site.work.optimizer.register_step_pre_hook(
        lambda *_: raw.append({n: p.grad.clone() for n, p in site.work.parameters.items()})
    )
    update = one_round(site, down, 0)
    first = site.control_change()
    assert first.keys() == update.keys()
    for name, change in first.items():  # no shift yet: what the steps took is the raw gradient
        mean = torch.stack([gradients[name] for gradients in raw]).mean(0)
        torch.testing.assert_close(change, mean, rtol=1e-4, atol=1e-7)
    plain = make("plain", augment=False)
    assert same(update, one_round(plain, down, 0))
    # The server's control is another: shift c - c_k, and the change counts from c_k.
    control = {name: 2.0 * tensor for name, tensor in first.items()}
    raw.clear()
    one_round(site, down, 1, control=control)
    for name, change in site.control_change().items():
        shift = control[name] - first[name]
        mean = torch.stack([gradients[name] - shift for gradients in raw]).mean(0)
        torch.testing.assert_close(change, mean - first[name], rtol=1e-3, atol=1e-5)
    # A turned basis: what the factors' controls were does not count.
    site.receive(down, round_index=2, turned=True, control=control)
    raw.clear()
    site.train(2)
    for name, change in site.control_change().items():
        if ".lora_" in name:
            mean = torch.stack([gradients[name] for gradients in raw]).mean(0)
            torch.testing.assert_close(change, mean, rtol=1e-3, atol=1e-6)


def test_ditto_trains_a_second_adapter_and_leaves_the_shared_one_alone(make: Make) -> None:
    plain = make("plain")
    sites = {w: make(f"ditto_{w}", personal="ditto", ditto_weight=w) for w in (0.1, 1e4)}
    down = start = sent_down(plain.work)
    for index in (0, 1):
        expected = one_round(plain, down, index)
        for site in sites.values():
            assert same(one_round(site, down, index), expected)
            assert same(site.work.adapter(), expected)
            moments = [s.memory.path("moments", index).read_bytes() for s in (plain, site)]
            assert moments[0] == moments[1]
        down = expected
    personal = {
        weight: load_file(site.memory.path("personal", 1)) for weight, site in sites.items()
    }
    assert not same(personal[0.1], down)
    assert apart(personal[1e4], start) < apart(personal[0.1], start)
    site = sites[0.1]
    score = site.evaluate("test")
    assert same(site.work.adapter(), down)  # put back after scoring
    plain.work.load_adapter(personal[0.1])
    assert plain.work.evaluate("test").cases == score.cases


def test_ditto_without_a_pull_is_a_site_alone(make: Make) -> None:
    alone, site = make("alone").work, make("ditto", personal="ditto", ditto_weight=0.0)
    start = sent_down(alone)
    for index in (0, 1):  # the server's adapter and its basis are nothing to the personal one
        alone.train(index)
        site.receive(start, round_index=index, turned=True)
        site.train(index)
        site.save(index)
        assert same(load_file(site.memory.path("personal", index)), alone.adapter())


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaffold": {"optimizer": "scaffold"},
    "ditto": {"personal": "ditto", "optimizer": "fedprox", "proximal_on": "products"},
    "private": {"rule": "private_b"},
    "by_turns": {"rule": "by_turns"},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_killed_site_goes_on_to_the_same_bytes(make: Make, kind: str, tmp_path: Path) -> None:
    whole, killed = (make(name, **KINDS[kind]) for name in ("whole", "killed"))
    down, control = sent_down(whole.work), {}
    for index in range(3):
        more = {"control": control} if kind == "scaffold" else {}
        update = one_round(whole, down, index, **more)
        if index:  # dies within the round, after training, with half of its files written
            killed.receive(down, round_index=index, turned=False, **more)
            killed.train(index)
            killed.memory.begin(index)
            killed.memory.write("private", index, {"half": torch.zeros(1)})
            killed = make("killed", **KINDS[kind])
        assert same(one_round(killed, down, index, **more), update)
        assert same(killed.control_change(), whole.control_change())
        control = whole.control_change()
        down = answered(down, update)
    for path in whole.state_files():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name
    assert len(whole.state_files()) >= 2


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "moves_base", "optimizer": "scaffold"},
        {"rule": "by_turns", "personal": "ditto"},
        {"optimizer": "fedprox", "proximal_weight": 10.0},
    ],
)
def test_other_processes_do_the_same_round(
    make: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folders = iter(range(9))

    def elsewhere(work: SiteWork, index: int, stop: Any, progress: Any) -> Any:
        path = tmp_path / f"round_{next(folders)}"
        path.mkdir()
        folder, other = RoundFolder(path), build_work(work.federation, work.site)
        folder.ask(work, index)
        RoundFolder(path).start(other)
        RoundFolder(path).answer(other, other.train(index, stop, progress))
        return folder.take(work)

    here, there = make("here", **changes), make("there", **changes)
    down = sent_down(here.work)
    more: dict[str, Any] = {}
    if here.work.parts.offset:
        more = {"offset": offset_of(here.work), "control": down}
    for index in (0, 1):
        for site, run in ((here, None), (there, elsewhere)):
            site.receive(down, round_index=index, turned=False, **more)
            site.train(index, run=run)
            site.save(index)
        assert same(here.update(), there.update())
        assert same(here.control_change(), there.control_change())
        down = answered(down, here.update())
    for path in here.state_files():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_moments_are_reset_after_a_missed_round_and_with_a_turned_basis(make: Make) -> None:
    site = make()
    down = sent_down(site.work)
    one_round(site, down, 0)

    def remembered(site: SiteRound, index: int, turned: bool) -> set[str]:
        site.receive(down, round_index=index, turned=turned)
        state = site.work.optimizer.state
        return {name for name, p in site.work.parameters.items() if p in state}

    assert remembered(site, 1, False) == down.keys()
    assert remembered(site, 1, True) == {name for name in down if ".lora_" not in name}
    assert remembered(site, 2, False) == set()
    assert remembered(make(moments="keep"), 1, True) == down.keys()


def test_what_does_not_belong_is_refused_and_changes_nothing(make: Make) -> None:
    site = make()
    down = sent_down(site.work)
    name = next(iter(down))
    before = {n: t.clone() for n, t in site.work.network.state_dict().items()}
    zero = {name: torch.zeros_like(down[name])}
    offset = {f"{name.rpartition('.')[0]}.offset_a": torch.zeros(1, 1)}
    for tensors, more, match in (
        ({n: t for n, t in down.items() if n != name}, {}, f"{name} is missing"),
        ({**down, "frozen": torch.zeros(1)}, {}, "frozen does not come down"),
        ({**down, name: torch.zeros(1)}, {}, r"is \(1,\), expected"),
        (down, {"offset": offset}, "does not change the frozen base"),
        (down, {"control": zero}, "optimizer is not scaffold"),
    ):
        with pytest.raises(UpdateError, match=match):
            site.receive(tensors, round_index=0, turned=False, **more)
    scaffold = make("scaffold", optimizer="scaffold")
    with pytest.raises(UpdateError, match="control of frozen"):
        scaffold.receive(down, round_index=0, turned=False, control={"frozen": torch.zeros(1)})
    nan = {name: torch.full_like(down[name], float("nan"))}
    with pytest.raises(UpdateError, match="nan or infinity"):
        scaffold.receive(down, round_index=0, turned=False, control=nan)
    moved = make("moved", rule="moves_base")
    endless = {n: torch.full_like(t, float("inf")) for n, t in offset_of(moved.work).items()}
    with pytest.raises(UpdateError, match="is not finite"):
        moved.receive(down, round_index=0, turned=False, offset=endless)
    with pytest.raises(ValueError, match="is half"):
        moved.receive(down, round_index=0, turned=False, offset=offset)
    for made in (site, scaffold, moved):
        assert same(dict(made.work.network.state_dict()), before)


def test_a_rule_that_is_not_there_or_does_not_fit_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="rule 'nothing' is not known"):
        make(rule="nothing")
    with pytest.raises(ValueError, match="has no adapters, which the rule needs"):
        make(rule="only_core", method="decoder")


def test_steps_out_of_order_are_refused(make: Make) -> None:
    site = make()
    for step in (lambda: site.train(0), site.update, site.control_change, lambda: site.save(0)):
        with pytest.raises(ValueError, match=r"call (receive|train) first"):
            step()
    site.receive(sent_down(site.work), round_index=0, turned=False)
    with pytest.raises(ValueError, match="round 1 was not received"):
        site.train(1)
    site.train(0)
    with pytest.raises(ValueError, match="round 1 was not trained"):
        site.save(1)
    with pytest.raises(ValueError, match="round 0 was not received"):
        site.train(0)  # twice would start from where the first ended
