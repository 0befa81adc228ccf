"""Slices in, bytes out: resizing, channels, drawing and random views."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits_files import flat_volume, make_volume
from torch.utils.data import ConcatDataset, DataLoader

from flap_nvflare.data.kits import DataError
from flap_nvflare.data.slices import (
    Draw,
    ForegroundSampler,
    SliceDataset,
    foreground_sampler,
    volume_batches,
)
from flap_nvflare.data.window import Window

PLAIN = Window(low=-1000, high=1000, mean=0, std=1)


def noisy(slices: int, side: int, seed: int = 0, name: str = "case") -> object:
    rng = np.random.default_rng(seed)
    label = (rng.random((slices, side, side)) < 0.2) * 1
    label[::2] = 0
    return make_volume(rng.normal(size=(slices, side, side)), label, name)


def test_an_item_is_its_slice() -> None:
    first, second = flat_volume([1, 2], [1]), flat_volume([3, 4, 5], [0])
    dataset = SliceDataset([first, second], Window(0, 10, 1, 2), 4)
    assert len(dataset) == 5
    item = dataset[3]
    assert item["image"].shape == (3, 4, 4)
    assert item["image"].dtype == torch.float32
    assert item["image"].unique().tolist() == [(4 - 1) / 2]
    assert item["label"].shape == (1, 4, 4)
    assert not item["label"].is_floating_point()
    assert (item["case"], item["slice"]) == ("case_00000", 1)
    assert dataset[2]["label"].all()
    assert not dataset[0]["label"].any()
    with pytest.raises(IndexError):
        dataset[5]


def test_neighbours_are_clamped_at_the_ends_and_never_leave_the_volume() -> None:
    parts = [flat_volume([1, 2, 3], []), flat_volume([7, 8], [])]
    dataset = SliceDataset(parts, PLAIN, 4, channels="neighbours")
    seen = [dataset[index]["image"][:, 0, 0].tolist() for index in range(5)]
    assert seen == [[1, 1, 2], [1, 2, 3], [2, 3, 3], [7, 7, 8], [7, 8, 8]]


def test_repeat_gives_three_equal_channels() -> None:
    image = SliceDataset([noisy(2, 8)], PLAIN, 8)[1]["image"]
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


def test_images_are_averaged_and_labels_are_picked() -> None:
    """From 4 to 2 pixels: a linear ramp keeps its symmetry, labels make no new class."""
    image = np.tile([0.0, 30.0, 60.0, 90.0], (1, 4, 1))
    label = np.zeros((1, 4, 4))
    label[0, :2, 2:] = 2
    item = SliceDataset([make_volume(image, label)], PLAIN, 2)[0]
    left, right = item["image"][0, 0].tolist()
    assert left + right == pytest.approx(90)
    assert 10 < left < 30
    assert item["label"][0].tolist() == [[0, 2], [0, 0]]


def test_a_slice_that_is_not_square_fills_the_square() -> None:
    label = np.zeros((1, 4, 8))
    label[0, :, 4:] = 1
    item = SliceDataset([make_volume(label * 5, label)], PLAIN, 8)[0]
    assert item["label"][0].float().mean() == 0.5
    assert item["image"].shape == (3, 8, 8)


def test_a_resized_volume_is_kept_for_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = noisy(3, 8)
    first = SliceDataset([volume], PLAIN, 4)[1]["image"]
    monkeypatch.setattr(Window, "apply", lambda *_: pytest.fail("windowed a second time"))
    assert torch.equal(SliceDataset([volume], PLAIN, 4, seed=9)[1]["image"], first)


def test_nothing_and_unknown_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="no volume"):
        SliceDataset([], PLAIN, 4)
    with pytest.raises(ValueError, match="mirror"):
        SliceDataset([noisy(1, 4)], PLAIN, 4, channels="mirror")
    with pytest.raises(ValueError, match="mirror"):
        next(volume_batches(noisy(1, 4), PLAIN, 4, "mirror", 1))


@pytest.mark.parametrize("channels", ["repeat", "neighbours"])
@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_evaluation_sees_every_slice_once_in_order(channels: str, size: int) -> None:
    volume = noisy(5, 12)
    batches = list(volume_batches(volume, PLAIN, 6, channels, size))
    assert [len(batch) for batch in batches] == {1: [1] * 5, 3: [3, 2], 5: [5], 9: [5]}[size]
    dataset = SliceDataset([volume], PLAIN, 6, channels)
    expected = torch.stack([dataset[index]["image"] for index in range(5)])
    assert torch.allclose(torch.cat(batches), expected, atol=1e-6)


# Drawing


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
    dataset = SliceDataset([flat_volume([1, 2], [])], PLAIN, 4)
    with pytest.raises(DataError, match="foreground"):
        foreground_sampler(dataset, 0.5, 0)
    assert sorted(int(i) for i in foreground_sampler(dataset, 0.0, 0)) == [0, 1]
    with pytest.raises(DataError, match="foreground_fraction"):
        foreground_sampler(dataset, 1.5, 0)


def test_joined_data_sets_are_drawn_from_as_one() -> None:
    left = SliceDataset([flat_volume([1, 2, 3], [1])], PLAIN, 4)
    right = SliceDataset([flat_volume([4, 5, 6], [0])], PLAIN, 4)
    order = [int(index) for index in foreground_sampler(ConcatDataset([left, right]), 1.0, 0)]
    assert sorted(order) == [1, 3]


def test_a_draw_keeps_its_number() -> None:
    draw = pickle.loads(pickle.dumps(Draw(7, 3) - 5))
    assert (int(draw), draw.number) == (2, 3)


# Random views


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers() -> None:
    parts = [
        SliceDataset([noisy(6, 16, seed)], PLAIN, 16, augment=True, seed=seed) for seed in (1, 2)
    ]
    joined = ConcatDataset(parts)

    def epoch(workers: int) -> list[bytes]:
        loader = DataLoader(
            joined, 2, sampler=foreground_sampler(joined, 0.7, 4), num_workers=workers
        )
        return [b["image"].numpy().tobytes() + b["label"].numpy().tobytes() for b in loader]

    assert epoch(0) == epoch(2)


def test_seed_slice_and_draw_each_change_the_view() -> None:
    volume = make_volume(np.tile(np.arange(64.0).reshape(8, 8), (2, 1, 1)), np.zeros((2, 8, 8)))
    views = [
        SliceDataset([volume], PLAIN, 8, augment=True, seed=seed)[Draw(index, number)]["image"]
        for seed, index, number in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    for number, view in enumerate(views):
        assert not any(torch.equal(view, other) for other in views[number + 1 :])
    again = SliceDataset([volume], PLAIN, 8, augment=True, seed=0)[Draw(0, 0)]["image"]
    assert torch.equal(views[0], again)


def test_image_and_label_move_together() -> None:
    """Where the label is drawn as a bright disc, it still lies on the disc after the change."""
    y, x = np.mgrid[:64, :64]
    disc = ((y - 40) ** 2 + (x - 20) ** 2 < 100) * 1.0
    dataset = SliceDataset([make_volume(disc[None], disc[None])], PLAIN, 64, augment=True, seed=5)
    sides = set()
    for number in range(20):
        item = dataset[Draw(0, number)]
        bright = item["image"][0] > item["image"][0].mean() + 0.3
        label = item["label"][0] == 1
        overlap = (bright & label).sum() / (bright | label).sum()
        assert overlap > 0.85
        assert set(item["label"].unique().tolist()) == {0, 1}
        columns = torch.nonzero(label)[:, 1].float().mean()
        assert torch.nonzero(label)[:, 0].float().mean() > 32  # never upside down
        sides.add(bool(columns > 32))
    assert sides == {True, False}


def test_the_kept_volume_is_not_changed_by_a_view() -> None:
    volume = noisy(2, 16)
    before = SliceDataset([volume], PLAIN, 16)[1]["image"].clone()
    SliceDataset([volume], PLAIN, 16, augment=True, seed=0)[1]
    assert torch.equal(before, SliceDataset([volume], PLAIN, 16)[1]["image"])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine also count as processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_view_is_cheap() -> None:
    dataset = SliceDataset([noisy(4, 96)], PLAIN, 96, augment=True)
    dataset[0]
    costs = []
    for number in range(60):
        start = time.process_time()
        dataset[Draw(number % 4, number)]
        costs.append(time.process_time() - start)
    # 0.7 ms alone on a core; the fastest tenth leaves out what else the machine does.
    assert sorted(costs)[6] < 4e-3
