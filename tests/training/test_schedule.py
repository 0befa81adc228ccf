from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.training.schedule import RoundClock, rate_factor


@pytest.mark.parametrize(
    ("progress", "factor"),
    [
        (0.0, 0.0),  # the warm-up starts at nothing
        (0.05, 0.5),  # half of the warm-up
        (0.1, 1.0),  # its end
        (0.55, 0.25),  # half of the rest: (1 - 0.5)^2
        (1.0, 0.0),
    ],
)
def test_hand_worked_factors(progress: float, factor: float) -> None:
    assert rate_factor(progress, warmup_fraction=0.1, decay_power=2.0) == pytest.approx(factor)


def test_without_warmup_the_full_rate_comes_first() -> None:
    assert rate_factor(0.0, warmup_fraction=0.0, decay_power=7.0) == 1.0


def test_warmup_alone_never_falls() -> None:
    assert rate_factor(1.0, warmup_fraction=1.0, decay_power=7.0) == 1.0
    assert rate_factor(0.5, warmup_fraction=1.0, decay_power=7.0) == 0.5


@given(
    progress=st.floats(0, 1),
    warmup=st.floats(0, 1),
    power=st.floats(0, 20),
)
def test_factor_stays_between_nothing_and_the_base_rate(
    progress: float, warmup: float, power: float
) -> None:
    assert 0.0 <= rate_factor(progress, warmup, power) <= 1.0


def test_steps_take_the_rate_at_the_middle_of_their_stretch() -> None:
    clock = RoundClock(rounds=2, warmup_fraction=0.0, decay_power=1.0, index=1, steps=2)
    # The round runs from 0.5 to 1; its steps stand for 0.625 and 0.875.
    assert [clock.factor(step) for step in (0, 1)] == pytest.approx([0.375, 0.125])


@given(
    index=st.integers(0, 3),
    small=st.integers(1, 40),
    times=st.integers(2, 10),
    power=st.sampled_from([0.0, 1.0]),
)
def test_a_round_has_the_same_mean_rate_at_small_and_large_sites(
    index: int, small: int, times: int, power: float
) -> None:
    def mean_rate(steps: int) -> float:
        clock = RoundClock(4, warmup_fraction=0.0, decay_power=power, index=index, steps=steps)
        return sum(clock.factor(step) for step in range(steps)) / steps

    assert mean_rate(small) == pytest.approx(mean_rate(small * times))
