from __future__ import annotations

import pytest
import torch
from aggregation_cases import (
    apart,
    exact_products,
    products,
    random_sites,
    site,
    unequal_federations,
    whole,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flap_nvflare.aggregation import Aggregate, AggregationError, Contribution, Round, fold
from flap_nvflare.aggregation.svd import Svd
from flap_nvflare.aggregation.tail import Tail

Matrices = dict[str, torch.Tensor]


def kept(result: Aggregate) -> Matrices:
    """What waits at the server, dense, by stem."""
    dense = {stem: torch.zeros_like(one) for stem, one in products(result.tensors).items()}
    for stem in dense:
        if f"{stem}.tail" in result.memory:
            dense[stem] = result.memory[f"{stem}.tail"].double()
        elif f"{stem}.tail_b" in result.memory:
            b, a = result.memory[f"{stem}.tail_b"], result.memory[f"{stem}.tail_a"]
            dense[stem] = b.double() @ a.double()
    return dense


def near(found: torch.Tensor, *expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_what_is_cut_comes_back() -> None:
    # diag(3, 2) is cut to diag(3, 0); the next round asks for diag(3, 2) again, after 4 in all.
    sites = [
        site("a", 1, a=[[1.0, 0.0]], b=[[6.0], [0.0]]),
        site("b", 1, a=[[0.0, 1.0]], b=[[0.0], [4.0]]),
    ]
    first = fold(Tail(), sites)
    near(products(first.tensors)["q"], [3.0, 0.0], [0.0, 0.0])
    near(kept(first)["q"], [0.0, 0.0], [0.0, 2.0])
    assert first.error == pytest.approx(2 / 13**0.5)
    second = fold(Tail(Round(index=1, memory=first.memory)), sites)
    near(products(second.tensors)["q"], [0.0, 0.0], [0.0, 4.0])
    near(kept(second)["q"], [3.0, 0.0], [0.0, 0.0])
    # Against the round's own diag(3, 2): diag(-3, 2).
    assert second.error == pytest.approx(1.0)


@settings(deadline=None, max_examples=60)
@given(unequal_federations(), st.integers(2, 5))
def test_what_was_sent_and_what_waits_is_what_was_asked(
    contributions: list[Contribution], rounds: int
) -> None:
    exact = exact_products(contributions)
    assume(whole(exact) > 1e-2)
    round, before = Round(), {stem: torch.zeros_like(one) for stem, one in exact.items()}
    for index in range(rounds):
        result = fold(Tail(round), contributions)
        asked = {stem: exact[stem] + before[stem] for stem in exact}
        sent, waits = products(result.tensors), kept(result)
        both = {stem: sent[stem] + waits[stem] for stem in sent}
        assert apart(both, asked) <= 2e-6 * (whole(asked) + whole(before))
        error = apart(sent, exact) / whole(exact)
        assert result.error == pytest.approx(error, rel=1e-4, abs=1e-5)
        round, before = Round(index=index + 1, memory=result.memory), waits


def test_a_weak_direction_asked_for_in_every_round_comes_through() -> None:
    # The sites hold 2 e1 e1^T; one of them adds e2 e2^T / 2 to what it was sent, every round.
    for rule, expected in ((Svd, 2.0), (Tail, 3.0)):
        b, a, memory = [[2.0], [0.0]], [[1.0, 0.0]], {}
        for index in range(6):
            # 4/3 and 1/3 halved by weights 3 to 1: b a + (e2 e2^T) / 2.
            start = site("a", 3, a=a, b=[[x[0] * 4 / 3] for x in b])
            step = site("b", 1, a=[[0.0, 2.0]], b=[[0.0], [1.0]])
            result = fold(rule(Round(index=index, memory=memory)), [start, step])
            b, a = (result.tensors[name].tolist() for name in ("q.lora_b", "q.lora_a"))
            memory = result.memory
        found = products(result.tensors)["q"]
        assert float(torch.linalg.svdvals(found)[0]) == pytest.approx(expected, rel=1e-4)
        assert abs(float(found[1, 1])) == pytest.approx(expected if rule is Tail else 0, abs=1e-4)


@pytest.mark.parametrize(("sites", "dense"), [(3, False), (12, True)])
def test_the_first_round_is_that_of_svd(sites: int, dense: bool) -> None:
    contributions = random_sites(sites, [(32, 40, 3)])
    result, svd = fold(Tail(), contributions), fold(Svd(), contributions)
    assert all(torch.equal(result.tensors[name], x) for name, x in svd.tensors.items())
    assert result.error == pytest.approx(svd.error, rel=1e-5)
    assert ("l0.tail" in result.memory) is dense


def test_the_memory_turns_dense_by_the_sum_of_ranks() -> None:
    contributions = random_sites(3, [(32, 40, 3)], drift=1.0)
    first = fold(Tail(), contributions)
    assert first.memory["l0.tail_a"].shape == (6, 40)
    second = fold(Tail(Round(memory=first.memory)), contributions)
    assert second.memory["l0.tail_a"].shape == (6, 40)  # the sites' own directions again
    other = random_sites(3, [(32, 40, 3)], seed=1, drift=1.0)
    third = fold(Tail(Round(memory=second.memory)), other)
    assert third.memory["l0.tail_a"].shape == (12, 40)
    fourth = fold(Tail(Round(memory=third.memory)), other)
    assert list(fourth.memory) == ["l0.tail"]
    assert list(fold(Tail(Round(memory=fourth.memory)), contributions[:1]).memory) == ["l0.tail"]


def test_equal_updates_leave_nothing_to_wait() -> None:
    one = random_sites(1, [(32, 40, 3)])[0]
    assert not fold(Tail(), [Contribution(name, 1, one.tensors) for name in "abc"]).memory


def test_a_memory_of_another_adapter_is_refused() -> None:
    for memory, text in (
        ({"l0.tail": torch.ones(3, 3)}, r"'l0.tail' is \(3, 3\); expected \(32, 40\)"),
        ({"l0.tail_b": torch.ones(32, 3)}, r"'l0.tail_b' is \(32, 3\), 'l0.tail_a' is None"),
    ):
        with pytest.raises(AggregationError, match=text):
            fold(Tail(Round(memory=memory)), random_sites(2, [(32, 40, 3)]))
