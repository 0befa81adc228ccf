"""Which slices are drawn, how often, and with which weight."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kits_files import flat_volume, prepare_volume
from torch.utils.data import ConcatDataset

from flap_nvflare.data.draws import Draw, ForegroundSampler, foreground_sampler
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.slices import SliceDataset
from flap_nvflare.data.window import Window

PLAIN = Window(low=-1000, high=1000, mean=0, std=1)


def flat_slices(values: list[int], shown: list[int]) -> SliceDataset:
    return SliceDataset([prepare_volume(flat_volume(values, shown), PLAIN, 4)])


def drawn(shows: list[bool], fraction: float, seed: int = 0, epochs: int = 1) -> list[list[int]]:
    sampler = ForegroundSampler(shows, fraction, seed)
    return [[int(index) for index in sampler] for _ in range(epochs)]


def test_an_epoch_shows_each_foreground_slice_once() -> None:
    shows = [True] * 6 + [False] * 14
    (order,) = drawn(shows, 0.5)
    assert len(order) == 12
    assert sorted(index for index in order if index < 6) == list(range(6))
    assert len({index for index in order if index >= 6}) == 6


def test_an_epoch_is_never_longer_than_the_data() -> None:
    (order,) = drawn([True] * 6 + [False] * 4, 0.3)
    assert len(order) == 10
    assert sum(index < 6 for index in order) == 3


@settings(max_examples=60, deadline=None)
@given(
    shown=st.integers(1, 12),
    empty=st.integers(1, 12),
    fraction=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_share_holds_to_a_slice(shown: int, empty: int, fraction: float, seed: int) -> None:
    shows = [True] * shown + [False] * empty
    (order,) = drawn(shows, fraction, seed)
    assert len(order) == min(len(shows), round(shown / fraction))
    count = sum(index < shown for index in order)
    assert abs(count - fraction * len(order)) < 1
    assert drawn(shows, fraction, seed) == [order]


def test_the_share_holds_in_expectation() -> None:
    epochs = drawn([True] * 3 + [False] * 7, 0.45, epochs=2000)
    share = np.mean([index < 3 for epoch in epochs for index in epoch])
    assert share == pytest.approx(0.45, abs=0.01)
    assert len({tuple(epoch) for epoch in epochs}) > 1000


def test_without_background_every_slice_comes_once() -> None:
    assert sorted(drawn([True] * 5, 0.5)[0]) == list(range(5))


def test_without_foreground_nothing_can_be_drawn() -> None:
    dataset = flat_slices([1, 2], [])
    with pytest.raises(DataError, match="foreground"):
        foreground_sampler(dataset, 0.5, 0)
    assert sorted(int(i) for i in foreground_sampler(dataset, 0.0, 0)) == [0, 1]
    with pytest.raises(DataError, match="foreground_fraction"):
        foreground_sampler(dataset, 1.5, 0)


def test_joined_data_sets_are_drawn_from_as_one() -> None:
    left = flat_slices([1, 2, 3], [1])
    right = flat_slices([4, 5, 6], [0])
    order = [int(index) for index in foreground_sampler(ConcatDataset([left, right]), 1.0, 0)]
    assert sorted(order) == [1, 3]


def test_a_draw_keeps_its_number() -> None:
    draw = pickle.loads(pickle.dumps(Draw(7, 3, 11, 0.5) - 5))
    assert (int(draw), draw.number, draw.seed, draw.weight) == (2, 3, 11, 0.5)


def test_a_round_has_its_own_draws_and_each_part_its_own_seed() -> None:
    sampler = ForegroundSampler([True] * 3 + [False] * 5, 0.5, 0, ends=(2, 8))
    rounds = []
    for seed, parts in ((5, (50, 51)), (6, (60, 61)), (5, (50, 51))):
        sampler.begin(seed, parts)
        draws = [draw for _ in range(2) for draw in sampler]
        assert [draw.number for draw in draws] == list(range(12))
        assert all(draw.seed == parts[int(draw >= 2)] for draw in draws)
        rounds.append([int(draw) for draw in draws])
    assert rounds[0] == rounds[2] != rounds[1]


# Weights


def test_weights_by_hand() -> None:
    """Two of ten slices show foreground and are half of the draws: 0.2 / 0.5 and 0.8 / 0.5."""
    shows = [True] * 2 + [False] * 8
    for draw in ForegroundSampler(shows, 0.5, 0, weighted=True):
        assert draw.weight == pytest.approx(0.4 if draw < 2 else 1.6)
    assert {draw.weight for draw in ForegroundSampler(shows, 0.5, 0)} == {None}


def test_weighted_draws_count_every_slice_alike() -> None:
    sampler = ForegroundSampler([True] * 3 + [False] * 7, 0.45, 0, weighted=True)
    totals, draws = np.zeros(10), 0
    for _ in range(4000):
        for draw in sampler:
            totals[draw] += draw.weight
            draws += 1
    assert totals / draws == pytest.approx(np.full(10, 0.1), abs=0.003)


def test_slices_all_of_a_kind_weigh_one() -> None:
    for shows, fraction in (([True] * 3, 0.4), ([False] * 3, 0.0)):
        assert {d.weight for d in ForegroundSampler(shows, fraction, 0, weighted=True)} == {1.0}


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_what_is_never_drawn_has_no_weight(fraction: float) -> None:
    with pytest.raises(DataError, match="never drawn"):
        ForegroundSampler([True, False], fraction, 0, weighted=True)
