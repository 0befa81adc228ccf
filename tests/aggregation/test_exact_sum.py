from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.aggregation import exact_sum
from flap_nvflare.aggregation.exact_sum import LIMIT, ExactSum

Columns = list[list[float]]


def summed(addends: Iterable[list[float]], levels: int = 3) -> torch.Tensor:
    total = ExactSum(levels)
    for addend in addends:
        total.add(torch.tensor(addend, dtype=torch.float64))
    return total.total()


def columns(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Columns]:
    """One to twelve addends of three entries each."""
    return st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=12)


# Magnitudes far apart make the window of levels move.
wild = st.one_of(
    st.floats(-LIMIT, LIMIT),
    st.builds(math.ldexp, st.floats(-1, 1), st.integers(-1080, 960)),
    st.floats(-4, 4),
)


@given(columns(wild), st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_order_gives_the_same_bits(addends: Columns, levels: int, random: Any) -> None:
    shuffled = list(addends)
    random.shuffle(shuffled)
    first = summed(addends, levels)
    assert first.numpy().tobytes() == summed(shuffled, levels).numpy().tobytes()
    assert first.numpy().tobytes() == summed(addends[::-1], levels).numpy().tobytes()


@given(columns(st.floats(-1e6, 1e6)))
def test_the_sum_is_the_exact_one_to_float64(addends: Columns) -> None:
    largest = max(abs(number) for addend in addends for number in addend)
    for found, numbers in zip(summed(addends).tolist(), zip(*addends, strict=True), strict=True):
        lost = len(addends) * (largest * 2.0**-72 + 2.0**-1045)
        assert found == pytest.approx(math.fsum(numbers), rel=2.0**-52, abs=lost)


@given(columns(wild), st.integers(1, 3))
def test_no_more_is_lost_than_the_levels_allow(addends: Columns, levels: int) -> None:
    largest = max(abs(number) for addend in addends for number in addend)
    lost = len(addends) * (largest * 2.0 ** (-36 * (levels - 1)) + 2.0**-1045)
    found = summed(addends, levels).tolist()
    for value, numbers in zip(found, zip(*addends, strict=True), strict=True):
        assert value == pytest.approx(math.fsum(numbers), rel=2.0**-51, abs=lost)


def test_a_float_sum_would_depend_on_the_order() -> None:
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert summed([[0.1], [0.2], [0.3]]).item() == summed([[0.3], [0.2], [0.1]]).item() == 0.6


def test_what_cancels_leaves_an_exact_zero() -> None:
    addends = [[0.1, 3e200], [-0.1, 1.0], [0.0, -3e200]]
    assert summed(addends).tolist() == [0.0, 0.0]  # 1.0 lies below the window of 3e200
    assert summed([[0.1], [1e-40], [-0.1]]).item() == 0.0
    assert summed([[0.1], [1e-15], [-0.1]]).item() == pytest.approx(1e-15, rel=1e-6)


def test_ties_go_the_same_way_in_every_order() -> None:
    # Half a grid step of the level of 2^40: rounded the same, whatever was summed before.
    addends = [[2.0**40], [0.5 * 2.0**36], [1.5 * 2.0**36], [-0.5 * 2.0**36]]
    assert summed(addends, 1).item() == summed(addends[::-1], 1).item()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, LIMIT * 1.01])
def test_an_addend_out_of_bounds_changes_nothing(bad: float) -> None:
    total = ExactSum()
    total.add(torch.tensor([1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected at most 9\.98e\+291"):
        total.add(torch.tensor([bad], dtype=torch.float64))
    assert total.total().item() == 1.0


def test_more_addends_than_are_exact_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_sum, "MOST", 2)
    with pytest.raises(ValueError, match="2 addends are the most"):
        summed([[1.0]] * 3)


def test_nothing_and_no_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="add at least one"):
        ExactSum().total()
    with pytest.raises(ValueError, match="levels: 0"):
        ExactSum(0)


def test_no_entries_at_all() -> None:
    assert summed([[]]).shape == (0,)
