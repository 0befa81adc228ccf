"""The windows of a site and of a scan by itself, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kits_files import flat_volume, make_volume, write_case

from flap_nvflare.data import scan, window
from flap_nvflare.data.kits import DataError
from flap_nvflare.data.scan import open_scan
from flap_nvflare.data.volume import Volume, load_volume
from flap_nvflare.data.window import (
    KITS_WINDOWS,
    Window,
    foreground_window,
    scan_window,
    volume_window,
)


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
    with pytest.raises(DataError, match="has one value, 7;"):
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


def scan_of(*values: np.ndarray | list[float]) -> Volume:
    """A volume of these values in any order, and a mask that says nothing of them."""
    flat = np.random.default_rng(0).permutation(np.concatenate(values))
    return make_volume(flat.reshape(1, 1, -1), np.zeros((1, 1, flat.size)))


def test_a_scan_without_its_air_gives_its_own_window() -> None:
    """800 of air, 100 to 300 of body: 280 is the 98 percentile, so air ends at 28."""
    found = volume_window(scan_of([0.0] * 800, np.arange(100.0, 301)))
    body = np.arange(100.0, 301).clip(101, 299)
    assert (found.low, found.high) == (101, 299)
    assert found.mean == pytest.approx(200)
    assert found.std == pytest.approx(body.std())


def test_the_lowest_tenth_of_the_range_is_air() -> None:
    """2 and 98 percentiles are 0 and 100: 10 is air, 11 is not."""
    found = volume_window(scan_of([0.0] * 50, [10.0] * 20, [11.0] * 20, [100.0] * 110))
    assert (found.low, found.high) == (11, 100)
    assert found.mean == pytest.approx((20 * 11 + 110 * 100) / 130)


def test_a_scan_without_air_keeps_its_dark_tissue() -> None:
    found = volume_window(scan_of(np.arange(500.0, 1501)))
    # 520 and 1480 are the ends of the range, so what counts begins above 616.
    assert (found.low, found.high) == pytest.approx((617 + 0.005 * 883, 1500 - 0.005 * 883))


@pytest.mark.parametrize(("gain", "offset"), [(3.7, 0.0), (1.0, -1024.0), (0.01, 5.0)])
def test_gain_and_offset_of_the_scanner_go_out(gain: float, offset: float) -> None:
    draw = np.random.default_rng(3)
    air, body = draw.rayleigh(8, 6000), draw.normal(300, 80, 3000)
    one, other = scan_of(air, body), scan_of(gain * air + offset, gain * body + offset)
    seen = [volume_window(volume).apply(volume.image) for volume in (one, other)]
    np.testing.assert_allclose(seen[1], seen[0], atol=1e-3)
    assert np.ptp(seen[0]) > 4


def test_no_label_has_a_part_in_a_scans_window() -> None:
    image = np.random.default_rng(1).normal(100, 30, (2, 9, 9))
    empty, full = (make_volume(image, np.full(image.shape, label)) for label in (0, 1))
    assert volume_window(empty) == volume_window(full)


@pytest.mark.parametrize("looked_at", [2**22, 100])
@pytest.mark.parametrize(
    "affine", [np.diag([-1.0, -1, -2, 1]), np.diag([1.0, 2, 3, 1])[[2, 0, 1, 3]]]
)
def test_a_scan_read_in_slabs_has_the_window_of_the_whole(
    looked_at: int, affine: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(2).gamma(2, 100, (7, 8, 9)).astype(np.float32)
    case = write_case(tmp_path / "case", image, np.zeros(image.shape, np.uint8), affine)
    monkeypatch.setattr(window, "LOOKED_AT", looked_at)
    whole = volume_window(load_volume(case, 1))
    for slab in (1, 2, 5, 16):
        monkeypatch.setattr(scan, "_SLAB", slab)
        assert scan_window(open_scan(case.image)) == whole


def test_of_a_large_scan_every_place_of_a_slice_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(window, "LOOKED_AT", 100)
    places = np.arange(1100.0).reshape(11, 10, 10)
    found = window._looked_at(places.shape, [places[:2], places[2:3], places[3:]])
    # 11 would do for the number, and has no divisor in common with 10 x 10.
    assert found.tolist() == list(range(0, 1100, 11))
    assert sorted(found % 100) == list(range(100))
    monkeypatch.setattr(window, "LOOKED_AT", 550)
    assert window._looked_at(places.shape, [places]).tolist() == list(range(0, 1100, 3))


@pytest.mark.parametrize("values", [([0.0] * 900, [7.0] * 100), ([7.0] * 990, [0.0] * 10)])
def test_a_scan_of_one_value_beside_air_is_refused(values: tuple[list[float], ...]) -> None:
    with pytest.raises(DataError, match="case_00000: all of it that is not air has one value, 7"):
        volume_window(scan_of(*values))
