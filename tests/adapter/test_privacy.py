"""The Gaussian mechanism by hand, its noise by its spread, its epsilon by the closed form."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flap_nvflare.adapter import privacy
from flap_nvflare.adapter.privacy import (
    Mechanism,
    PrivacyError,
    Releases,
    composed_epsilon,
    epsilon,
)

START = {"b": torch.tensor([1.0, 1.0]), "a": torch.tensor([[0.0]])}
TRAINED = {"a": torch.tensor([[2.0]]), "b": torch.tensor([2.0, 3.0])}  # moved by 2, 1, 2: norm 3


def test_all_tensors_are_clipped_as_one_vector() -> None:
    sent = Mechanism(1.5, 0.0).release(START, TRAINED)
    assert list(sent) == ["a", "b"]
    assert sent["a"].tolist() == [[1.0]]
    assert sent["b"].tolist() == [1.5, 2.0]


def test_a_short_move_is_sent_as_it_is() -> None:
    for clip in (3.0, 100.0):
        sent = Mechanism(clip, 0.0).release(START, TRAINED)
        assert all(torch.equal(sent[name], TRAINED[name]) for name in TRAINED)
    still = Mechanism(1.0, 0.0).release(START, START)
    assert all(torch.equal(still[name], START[name]) for name in START)


def test_dtypes_stay_and_parameters_are_read() -> None:
    start = {"a": torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))}
    sent = Mechanism(1.0, 1.0).release(start, start)
    assert sent["a"].dtype == torch.bfloat16
    assert not sent["a"].requires_grad


@pytest.mark.parametrize("seed", [None, 5])
def test_the_noise_is_normal_with_the_spread_that_was_asked_for(seed: int | None) -> None:
    count = 200_001  # odd: the pairs of the transform do not fit
    zeros = {"x": torch.zeros(count, dtype=torch.float64)}
    noise = Mechanism(0.5, 3.0, seed).release(zeros, zeros)["x"] / 1.5
    # Five standard errors each of mean, variance and fourth moment.
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(noise.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    inside = (noise.abs() < 1).double().mean()
    assert abs(inside - math.erf(math.sqrt(0.5))) < 5 * 0.5 / math.sqrt(count)
    # Neither neighbours nor the halves of the transform go together.
    for lag in (1, count // 2, count // 2 + 1):
        assert abs((noise[lag:] * noise[:-lag]).mean()) < 5 / math.sqrt(count - lag)


def test_the_noise_of_the_secure_source_never_comes_again() -> None:
    draws = [Mechanism(1.0, 1.0).release(START, TRAINED)["b"] for _ in range(2)]
    assert not torch.equal(*draws)
    torch.manual_seed(0)
    first = Mechanism(1.0, 1.0).release(START, TRAINED)["b"]
    torch.manual_seed(0)
    assert not torch.equal(first, Mechanism(1.0, 1.0).release(START, TRAINED)["b"])


def test_the_secure_source_is_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def random(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    monkeypatch.setattr(privacy.os, "urandom", random)
    monkeypatch.setattr(privacy, "_CHUNK", 4)
    zeros = {"x": torch.zeros(6, dtype=torch.float64)}
    sent = Mechanism(1.0, 1.0).release(zeros, zeros)["x"]
    assert asked == [32] * 4 + [16] * 4  # four draws of 4 numbers, then of 2
    # All bits zero: uniforms 2^-53, so radius sqrt(106 log 2), angle almost 0; summed as 4 / 2.
    radius = 2 * math.sqrt(106 * math.log(2))
    assert sent.tolist() == pytest.approx([radius, radius, 0, 0, radius, 0], abs=1e-12)


def test_a_seed_gives_the_same_noise_and_is_said_to_protect_nothing() -> None:
    draws = [Mechanism(1.0, 1.0, seed).release(START, TRAINED)["b"] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    said = Mechanism(1.0, 1.0, seed=1).statement({1.0: 3}, 1e-5)
    assert said["secret"] is False
    assert said["epsilon_replace"] is None
    assert said["epsilon_zero_out"] is None
    assert Mechanism(1.0, 0.0).statement({0.0: 3}, 1e-5)["secret"] is False
    # Protected now, but not once before.
    assert Mechanism(1.0, 1.0).statement({0.0: 1, 1.0: 3}, 1e-5)["secret"] is False


def test_the_statement_holds_both_figures() -> None:
    said = Mechanism(2.0, 4.0).statement({4.0: 3}, 1e-5)
    assert said == {
        "clip": 2.0,
        "noise": 4.0,
        "releases": 3,
        "delta": 1e-5,
        "unit": "all data of one site",
        "secret": True,
        "epsilon_replace": epsilon(4.0, 3, 1e-5),
        "epsilon_zero_out": epsilon(4.0, 3, 1e-5, "zero_out"),
    }


BAD = {
    "only among the start": (START, {"a": TRAINED["a"]}),
    "only among the trained": (START, {**TRAINED, "c": torch.zeros(1)}),
    r"'a' has shape \(2,\), it started as \(1, 1\)": (START, {**TRAINED, "a": torch.zeros(2)}),
    "'b' holds nan or infinity": (START, {**TRAINED, "b": torch.tensor([math.nan, 0.0])}),
}


@pytest.mark.parametrize("text", BAD)
def test_what_has_no_difference_is_refused(text: str) -> None:
    with pytest.raises(PrivacyError, match=text):
        Mechanism(1.0, 1.0).release(*BAD[text])


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_clip_is_refused(clip: float) -> None:
    with pytest.raises(PrivacyError, match="dp_clip"):
        Mechanism(clip, 1.0)


@pytest.mark.parametrize("noise", [-1.0, math.inf, math.nan])
def test_a_bad_noise_is_refused(noise: float) -> None:
    with pytest.raises(PrivacyError, match="dp_noise"):
        Mechanism(1.0, noise)
    with pytest.raises(PrivacyError, match="dp_noise"):
        epsilon(noise, 1, 1e-5)


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8),
    clip=st.floats(1e-3, 1e3),
)
@settings(deadline=None)
def test_no_move_is_longer_than_the_clip_and_none_is_turned(
    values: list[float], clip: float
) -> None:
    trained = {"x": torch.tensor(values, dtype=torch.float64)}
    start = {"x": torch.zeros(len(values), dtype=torch.float64)}
    sent = Mechanism(clip, 0.0).release(start, trained)["x"]
    length = float(trained["x"].norm())
    assert float(sent.norm()) <= clip * (1 + 1e-12)
    share = min(1.0, clip / length) if length else 1.0
    torch.testing.assert_close(sent, trained["x"] * share)


def closed_form(noise: float, rounds: int, delta: float) -> float:
    """min over a of a k / (2 z^2) + log(1 - 1/a) - (log delta + log a) / (a - 1), finely."""
    orders = [1 + 1.002**i / 1000 for i in range(9000)]
    return min(
        a * rounds / (2 * noise**2) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in orders
    )


@pytest.mark.parametrize(
    ("noise", "rounds", "delta"),
    [(1.0, 1, 1e-5), (2.0, 25, 1e-5), (10.0, 25, 1e-5), (5.0, 3, 1e-6), (30.0, 100, 1e-3)],
)
def test_epsilon_is_the_closed_forms(noise: float, rounds: int, delta: float) -> None:
    expected = closed_form(noise, rounds, delta)
    found = epsilon(noise, rounds, delta, "zero_out")
    # Both take a minimum over some orders: the accountant's are coarser, these in steps of 0.2 %.
    assert expected * (1 - 1e-5) <= found <= expected * 1.02
    # Twice the sensitivity is half the noise.
    assert epsilon(noise, rounds, delta) == epsilon(noise / 2, rounds, delta, "zero_out")


def test_epsilon_of_one_message_is_above_the_exact_one_and_near_it() -> None:
    # Balle and Wang, arXiv 1805.06530: the least delta of one Gaussian message at epsilon.
    def delta_of(eps: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return phi(0.5 - eps) - math.exp(eps) * phi(-0.5 - eps)

    found = epsilon(1.0, 1, 1e-5, "zero_out")
    assert delta_of(found) <= 1e-5
    assert delta_of(found - 0.5) > 1e-5


@given(noise=st.floats(0.5, 50), rounds=st.integers(1, 50))
@settings(deadline=None, max_examples=30)
def test_more_rounds_cost_more_and_more_noise_costs_less(noise: float, rounds: int) -> None:
    here = epsilon(noise, rounds, 1e-5)
    assert 0 < here < epsilon(noise, rounds + 1, 1e-5)
    assert epsilon(noise * 1.1, rounds, 1e-5) < here
    assert epsilon(noise, rounds, 1e-4) < here
    assert epsilon(noise, rounds, 1e-5, "zero_out") < here


def test_messages_with_other_noise_compose() -> None:
    # Renyi divergences add up: k / z^2 is all that counts.
    mixed = composed_epsilon({4.0: 16, 2.0: 4}, 1e-5)
    assert mixed == pytest.approx(epsilon(4.0, 32, 1e-5), rel=1e-9)


def test_epsilon_without_messages_or_without_noise() -> None:
    assert epsilon(1.0, 0, 1e-5) == 0.0
    assert epsilon(0.0, 0, 1e-5) == 0.0
    assert composed_epsilon({0.0: 1, 9.0: 2}, 1e-5) == math.inf


def test_bad_figures_are_refused() -> None:
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(PrivacyError, match="dp_delta"):
            epsilon(1.0, 1, delta)
    for count in (-1, 1.5, True):
        with pytest.raises(PrivacyError, match="give a count"):
            epsilon(1.0, count, 1e-5)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="relation 'add'"):
        epsilon(1.0, 1, 1e-5, "add")


def test_without_the_accountant_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PrivacyError, match=r"pip install 'flap_nvflare\[privacy\]'"):
        epsilon(1.0, 1, 1e-5)


def test_a_site_that_missed_rounds_has_released_fewer_messages(tmp_path: Path) -> None:
    path = tmp_path / "state" / "releases.json"
    assert [Releases(path).add(2.0) for _ in range(3)] == [1, 2, 3]  # a process for every round
    Releases(path).add(4.0)
    assert Releases(path).counts == {2.0: 3, 4.0: 1}
    three = composed_epsilon(Releases(path).counts, 1e-5)
    assert epsilon(2.0, 3, 1e-5) < three < epsilon(2.0, 10, 1e-5)


def test_a_damaged_count_is_not_taken_for_none(tmp_path: Path) -> None:
    path = tmp_path / "releases.json"
    for text in ("{", "[1]", '{"x": 1}', '{"1.0": "many"}'):
        path.write_text(text)
        with pytest.raises(PrivacyError, match=r"releases\.json: no count"):
            Releases(path)


def test_a_count_that_can_not_be_written_stops_the_message(tmp_path: Path) -> None:
    path = tmp_path / "file" / "releases.json"
    (tmp_path / "file").write_bytes(os.urandom(1))
    with pytest.raises(OSError, match="file"):
        Releases(path).add(1.0)
