from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flap_nvflare.adapter.container import CodecError
from flap_nvflare.adapter.sparse import gaps, largest, positions


def test_the_largest_are_kept_and_ties_go_by_position() -> None:
    values = torch.tensor([1.0, -3.0, 1.0, -1.0, 2.0])
    assert largest(values, 3).tolist() == [True, True, False, False, True]
    assert largest(values, 9).all()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 35))
@settings(max_examples=100, deadline=None)
def test_no_number_that_is_left_out_is_larger(drawn: list[int], count: int) -> None:
    mask = largest(torch.tensor(drawn, dtype=torch.float32), count).tolist()
    order = sorted(range(len(drawn)), key=lambda i: (-abs(drawn[i]), i))[:count]
    assert [i for i, kept in enumerate(mask) if kept] == sorted(i for i in order if drawn[i])


def test_a_zero_is_never_among_the_largest() -> None:
    assert largest(torch.tensor([0.0, 5.0, -0.0]), 2).tolist() == [False, True, False]


def test_gaps_by_hand() -> None:
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[[0, 2, 258, 514]] = True
    # Skipped are 0, 1, 255 and 255: a gap of 255 is 255 and 0.
    assert gaps(mask).tolist() == [0, 1, 255, 0, 255, 0]
    assert positions(gaps(mask), 1000, 4).tolist() == [0, 2, 258, 514]


@given(st.sets(st.integers(0, 1999), max_size=40))
@settings(max_examples=100, deadline=None)
def test_positions_come_back(chosen: set[int]) -> None:
    mask = torch.zeros(2000, dtype=torch.bool)
    mask[sorted(chosen)] = True
    assert positions(gaps(mask), 2000, 40).tolist() == sorted(chosen)


@pytest.mark.parametrize(
    ("written", "reason"),
    [([0, 255], "no end"), ([0, 0, 0], "at most 2"), ([255, 0], "beyond the 10"), ([10], "beyond")],
)
def test_wrong_positions_are_refused(written: list[int], reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        positions(torch.tensor(written, dtype=torch.uint8), 10, 2)
