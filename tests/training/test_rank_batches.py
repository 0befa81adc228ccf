"""Batches dealt out to processes: every row once, every process every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from flap_nvflare.training.rank_batches import RankBatches


def dealt(rows: int, batch_size: int, count: int) -> list[RankBatches]:
    sampler = SequentialSampler(range(rows))
    return [RankBatches(sampler, batch_size, rank, count) for rank in range(count)]


def test_seven_rows_in_batches_of_three_for_two() -> None:
    first, second = dealt(7, 3, 2)
    assert list(first) == [[0, 2], [3, 5], [6]]
    # The last batch has one row: the second process takes it as well, and it counts for nothing.
    assert list(second) == [[1], [4], [6]]
    assert first.shares == (2 / 3, 2 / 3, 1)
    assert second.shares == (1 / 3, 1 / 3, 0)


def test_one_process_has_every_batch_whole() -> None:
    (alone,) = dealt(7, 3, 1)
    assert list(alone) == [[0, 1, 2], [3, 4, 5], [6]]
    assert alone.shares == (1, 1, 1)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6))
def test_weighed_means_are_the_means_of_the_whole_batches(
    rows: int, batch_size: int, count: int
) -> None:
    (whole,) = dealt(rows, batch_size, 1)
    parts = dealt(rows, batch_size, count)
    assert {len(part) for part in parts} == {len(whole)}
    assert {len(part.shares) for part in parts} == {len(whole)}
    steps = zip(*parts, strict=True)
    shares = zip(*(part.shares for part in parts), strict=True)
    for batch, dealt_rows, weights in zip(whole, steps, shares, strict=True):
        assert all(dealt_rows)
        counted = [row for own, weight in zip(dealt_rows, weights, strict=True) if weight
                   for row in own]  # fmt: skip
        assert sorted(counted) == batch
        means = [sum(own) / len(own) for own in dealt_rows]
        mean = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
        assert mean == pytest.approx(sum(batch) / len(batch))


@pytest.mark.parametrize(("rank", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_processes_is_refused(rank: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is none of {count} processes"):
        RankBatches(SequentialSampler(range(4)), 2, rank, count)
