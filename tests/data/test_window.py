"""The site's window, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from kits_files import flat_volume, make_volume

from flap_nvflare.data.kits import DataError
from flap_nvflare.data.window import KITS_WINDOWS, Window, foreground_window


def test_apply_clips_and_scores() -> None:
    window = Window(low=0, high=100, mean=50, std=25)
    scored = window.apply(np.array([[-1000, 0, 50], [75, 100, 3000]], np.float32))
    assert scored.tolist() == [[-2, -2, 0], [1, 2, 2]]
    assert scored.dtype == np.float32


def test_the_foreground_of_all_cases_gives_the_window() -> None:
    """0, 1, ..., 200 over two cases: the 0.5 percentile is 1, the 99.5 percentile 199."""
    values = np.arange(201.0)
    image = np.full((1, 1, 300), 5000.0)
    parts = []
    for chosen in (values[:90], values[90:]):
        scan, label = image.copy(), np.zeros(image.shape)
        scan[0, 0, : len(chosen)] = chosen
        label[0, 0, : len(chosen)] = 1 + np.arange(len(chosen)) % 2
        parts.append(make_volume(scan, label))
    window = foreground_window(parts)
    clipped = values.clip(1, 199)
    assert (window.low, window.high) == (1, 199)
    assert window.mean == pytest.approx(100)
    assert window.std == pytest.approx(clipped.std())


def test_the_window_scores_its_own_foreground_to_zero_and_one() -> None:
    rng = np.random.default_rng(0)
    volume = make_volume(rng.normal(90, 60, (4, 9, 9)), np.ones((4, 9, 9)))
    scored = foreground_window([volume]).apply(volume.image)
    assert scored.mean() == pytest.approx(0, abs=1e-5)
    assert scored.std() == pytest.approx(1, abs=1e-5)


def test_without_foreground_there_is_no_window() -> None:
    with pytest.raises(DataError, match=r"no training case shows foreground.*case_00000"):
        foreground_window([flat_volume([1, 2], shown=[])])
    with pytest.raises(DataError, match="no training case"):
        foreground_window([])


def test_a_constant_foreground_is_refused() -> None:
    with pytest.raises(DataError, match="7 HU"):
        foreground_window([flat_volume([7, 9], shown=[0])])


@pytest.mark.parametrize(
    "values",
    [(1, 1, 0, 1), (2, 1, 0, 1), (0, 1, 0, 0), (0, 1, 0, -1), (0, 1, float("nan"), 1)],
)
def test_a_window_that_divides_by_nothing_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(DataError):
        Window(*values)


def test_the_published_windows() -> None:
    assert sorted(KITS_WINDOWS) == list("ABCDEF")
    assert KITS_WINDOWS["C"] == Window(-89, 325, 123.7, 97.3)
