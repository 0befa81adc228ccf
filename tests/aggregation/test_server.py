"""A round at the server: the rule, the optimiser's step, and what goes on to the next round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from aggregation_cases import exact_products, held, products, random_sites, site
from torch import Tensor

from flap_nvflare.aggregation import RULES, Aggregate, AggregationError, Contribution, Round, fold
from flap_nvflare.aggregation.server import ServerRound, ServerState
from flap_nvflare.bench.many_sites import travelling
from flap_nvflare.settings import Federation

HEAD = {"head": torch.tensor([1.0])}
A, B = "q.lora_a", "q.lora_b"


def one_round(
    state: ServerState,
    sites: Sequence[Contribution],
    index: int = 0,
    steps: Mapping[str, int] | None = None,
    changes: Mapping[str, Mapping[str, Tensor]] | None = None,
    everyone: int = 0,
    **settings: Any,
) -> tuple[ServerState, Aggregate]:
    server = ServerRound(Federation(**settings), index, state)
    for one in sites:
        server.add(one, (steps or {}).get(one.site, 1), (changes or {}).get(one.site))
    return server.result(everyone or len(sites))


def heads(**values: float) -> list[Contribution]:
    return [site(name, 1.0, head=[value]) for name, value in values.items()]


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_fedavg_takes_the_rules_aggregate_to_the_bit(rule: str) -> None:
    sites = random_sites(5, [(9, 12, 2), (30, 20, 2)])
    start = random_sites(1, [(9, 12, 2), (30, 20, 2)], seed=4)[0].tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
    sent = travelling(RULES[rule].CARD, shapes)
    sites = [
        Contribution(
            one.site,
            one.weight,
            {n: one.tensors.get(n, torch.full(shape, one.weight)) for n, shape in sent.items()},
        )
        for one in sites
    ]
    shared = {n: start.get(n, torch.zeros(shape)) for n, shape in sent.items()}
    if rule == "alternate":
        shared = dict(start)
    after, found = one_round(ServerState(shared), sites, rule=rule, rank=2, seed=3)
    known = Round(rank=2, seed=3, start=shared)
    expected = fold(RULES[rule](known), reversed(sites))
    assert equal(found.tensors, expected.tensors)
    assert equal(after.tensors, dict(sorted({**shared, **expected.tensors}.items())))
    assert equal(after.offset, expected.offset)
    assert (after.turned, dict(after.control)) == (expected.turned, {})
    assert {n.removeprefix("rule/") for n in after.memory} == set(expected.memory)


def test_fednova_by_hand() -> None:
    # From 1: shares 1/4, 3/4, steps 2, 6; tau_eff = 5; 1 + 5 (1/4 * 4 / 2 + 3/4 * 8 / 6) = 8.5.
    sites = [site("a", 1.0, head=[5.0]), site("b", 3.0, head=[9.0])]
    settings = {"rule": "mean", "optimizer": "fednova"}
    after, _ = one_round(ServerState(HEAD), sites, steps={"a": 2, "b": 6}, **settings)
    assert after.tensors["head"].tolist() == pytest.approx([8.5])
    same, _ = one_round(ServerState(HEAD), sites, steps={"a": 4, "b": 4}, **settings)
    assert same.tensors["head"].tolist() == pytest.approx([8.0])  # the mean


def test_fedavgm_goes_on_with_its_momentum() -> None:
    # d = 2 and m = 2 from 1 to 3; then d = 1 and m = 0.5 * 2 + 1 = 2 from 3 to 5.
    settings = {"rule": "mean", "optimizer": "fedavgm", "server_momentum": 0.5}
    first, _ = one_round(ServerState(HEAD), heads(a=2.0, b=4.0), **settings)
    assert first.tensors["head"].tolist() == [3.0]
    assert first.kept("optimizer/")["momentum/head"].tolist() == [2.0]
    second, _ = one_round(first, heads(a=4.0), index=1, **settings)
    assert second.tensors["head"].tolist() == [5.0]
    assert second.kept("optimizer/")["momentum/head"].tolist() == [2.0]
    # The rate is of the step.
    slow, _ = one_round(first, heads(a=4.0), index=1, server_rate=0.25, **settings)
    assert slow.tensors["head"].tolist() == [3.5]


@pytest.mark.parametrize("gauge", ["balanced", "aligned"])
def test_momentum_of_factors_lives_as_long_as_their_basis(gauge: str) -> None:
    start = random_sites(1, [(6, 5, 2)])[0].tensors
    settings = {"optimizer": "fedavgm", "gauge": gauge, "rank": 2}
    state = ServerState(start)
    for index in range(2):
        state, found = one_round(state, random_sites(3, [(6, 5, 2)], seed=index), index, **settings)
    momenta = {name.removeprefix("momentum/") for name in state.kept("optimizer/")}
    if gauge == "aligned":
        assert momenta == {"head", "l0.lora_a", "l0.lora_b"}
        assert not torch.equal(state.tensors["l0.lora_b"], found.tensors["l0.lora_b"])
    else:
        assert momenta == {"head"}
        assert torch.equal(state.tensors["l0.lora_b"], found.tensors["l0.lora_b"])
    assert state.turned == (gauge == "balanced")
    assert not torch.equal(state.tensors["head"], found.tensors["head"])


def test_scaffolds_control_is_a_mean_over_all_sites() -> None:
    # (2 + 4) / 4 of four sites, two of them silent; the next round adds (-4) / 4.
    settings = {"rule": "mean", "optimizer": "scaffold", "everyone": 4}
    changes = {"a": {"head": torch.tensor([2.0])}, "b": {"head": torch.tensor([4.0])}}
    first, _ = one_round(ServerState(HEAD), heads(a=2.0, b=4.0), changes=changes, **settings)
    assert first.tensors["head"].tolist() == [3.0]
    assert first.control["head"].tolist() == [1.5]
    changes = {"c": {"head": torch.tensor([-4.0])}}
    second, _ = one_round(first, heads(c=3.0), index=1, changes=changes, **settings)
    assert second.control["head"].tolist() == [0.5]
    third, _ = one_round(second, heads(c=3.0), index=2, **settings)
    assert third.control["head"].tolist() == [0.5]  # nobody sent one


@pytest.mark.parametrize("turned", [False, True])
def test_a_control_of_factors_does_not_outlive_their_basis(turned: bool) -> None:
    adapter = {A: torch.tensor([[1.0]]), B: torch.tensor([[1.0]]), **HEAD}
    control = {name: torch.full_like(tensor, 8.0) for name, tensor in adapter.items()}
    changes = {"a": {name: torch.ones_like(tensor) for name, tensor in adapter.items()}}
    state = ServerState(adapter, control=control, turned=turned)
    sites = [site("a", 1.0, a=[[1.0]], b=[[2.0]], head=[3.0])]
    after, _ = one_round(state, sites, changes=changes, optimizer="scaffold", rank=1)
    found = {name: tensor.item() for name, tensor in after.control.items()}
    factor = 1.0 if turned else 9.0
    assert found == {A: factor, B: factor, "head": 9.0}


def test_a_change_may_be_used_again_once_it_was_added() -> None:
    change = {"head": torch.tensor([2.0])}
    server = ServerRound(Federation(rule="mean", optimizer="scaffold"), 0, ServerState(HEAD))
    server.add(heads(a=2.0)[0], 1, change)
    change["head"].zero_()
    assert server.result(1)[0].control["head"].tolist() == [2.0]


def test_what_does_not_train_by_turns_stays() -> None:
    start = {A: torch.tensor([[1.0, 2.0]]), B: torch.tensor([[0.0]]), **HEAD}
    settings = {"rule": "alternate", "rank": 1}
    even = [site("a", 1, b=[[2.0]], head=[2.0]), site("b", 3, b=[[6.0]], head=[6.0])]
    first, found = one_round(ServerState(start), even, index=0, **settings)
    assert set(found.tensors) == {B, "head"}
    assert {n: t.tolist() for n, t in first.tensors.items()} == {
        A: [[1.0, 2.0]],
        B: [[5.0]],
        "head": [5.0],
    }
    odd = [site("a", 1, a=[[3.0, 4.0]], head=[2.0])]
    second, _ = one_round(first, odd, index=1, **settings)
    assert {n: t.tolist() for n, t in second.tensors.items()} == {
        A: [[3.0, 4.0]],
        B: [[5.0]],
        "head": [2.0],
    }
    with pytest.raises(AggregationError, match="does not travel in round 1"):
        one_round(first, even, index=1, **settings)


def test_what_rule_tail_drops_waits_in_the_state() -> None:
    # diag(3, 2) is cut to diag(3, 0); asked again, 2 + 2 have gathered and win the second time.
    start = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[0.0], [0.0]])}
    sites = [site("a", 1, a=[[1.0, 0.0]], b=[[6.0], [0.0]]),
             site("b", 1, a=[[0.0, 1.0]], b=[[0.0], [4.0]])]  # fmt: skip
    first, _ = one_round(ServerState(start), sites, rule="tail", rank=1)
    assert set(first.kept("rule/")) <= {"q.tail", "q.tail_a", "q.tail_b"}
    assert first.kept("rule/")
    second, _ = one_round(first, sites, index=1, rule="tail", rank=1)
    expected = torch.tensor([[0.0, 0.0], [0.0, 4.0]]).double()
    torch.testing.assert_close(products(dict(second.tensors))["q"], expected, rtol=0, atol=1e-5)
    forgot, _ = one_round(ServerState(first.tensors), sites, index=1, rule="tail", rank=1)
    assert products(dict(forgot.tensors))["q"][0, 0] == pytest.approx(3.0, abs=1e-5)


def test_the_offset_is_handed_on_and_makes_every_round_exact() -> None:
    state = ServerState(random_sites(1, [(9, 12, 2)], seed=8)[0].tensors)
    for index in range(3):
        sites = random_sites(3, [(9, 12, 2)], seed=index)
        before = state.offset
        state, found = one_round(state, sites, index, rule="residual", rank=2)
        assert found.error < 1e-5
        now = held(Aggregate(dict(state.tensors), 0.0, False, dict(state.offset)), before)
        exact = exact_products(sites)["l0"]
        torch.testing.assert_close(now["l0"], exact, rtol=0, atol=1e-5)
    assert state.parcel().offset.keys() == {"l0.offset_a", "l0.offset_b"}


def test_a_step_goes_from_what_the_sites_held() -> None:
    # What came down was 2, not the server's 1: half the way from 2 to 4.
    federation = Federation(rule="mean", server_rate=0.5)
    server = ServerRound(federation, 0, ServerState(HEAD), {"head": torch.tensor([2.0])})
    server.add(heads(a=4.0)[0])
    assert server.result(1)[0].tensors["head"].tolist() == [3.0]


def test_a_refused_update_leaves_no_trace() -> None:
    server = ServerRound(Federation(rule="mean", optimizer="fednova"), 0, ServerState(HEAD))
    server.add(heads(a=3.0)[0], 2)
    with pytest.raises(AggregationError, match="twice"):
        server.add(heads(a=9.0)[0], 9)
    with pytest.raises(AggregationError, match="nan"):
        server.add(heads(b=float("nan"))[0], 9)
    assert server.result(2)[0].tensors["head"].tolist() == [3.0]


def test_an_empty_round_has_no_state() -> None:
    with pytest.raises(AggregationError, match="at least one site"):
        ServerRound(Federation(), 0, ServerState(HEAD)).result(3)
