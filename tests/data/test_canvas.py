"""The canvas of the phantoms: millimetres, bent coordinates, smooth noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.data.canvas import Canvas, rotation, turned


@pytest.fixture
def canvas() -> Canvas:
    return Canvas((10, 40, 40), (5.0, 2.0, 2.0), np.random.default_rng(0))


def test_coordinates_are_millimetres_from_the_centre_bent_by_some(canvas: Canvas) -> None:
    straight = (np.arange(10) - 4.5) * 5.0
    bent = canvas.z - straight[:, None, None]
    assert 0.5 < bent.std() < 6
    assert np.abs(bent).max() < 14


def test_an_ellipsoid_fills_its_volume_about_its_centre(canvas: Canvas) -> None:
    box, field = canvas.ellipsoid((0, 4, -6), (14, 12, 12), rough=0.0)
    canvas.fill(box, field < 1, 7.0)
    filled = canvas.hu == 7.0
    expected = 4 / 3 * np.pi * 14 * 12 * 12
    assert filled.sum() * 5 * 2 * 2 == pytest.approx(expected, rel=0.3)
    middle = np.argwhere(filled).mean(axis=0)
    assert middle == pytest.approx([4.5, 21.5, 16.5], abs=2.5)


def test_an_ellipsoid_outside_the_scan_paints_nothing(canvas: Canvas) -> None:
    box, field = canvas.ellipsoid((0, 900, 0), (5, 5, 5))
    canvas.fill(box, field < 1, 7.0)
    assert not (canvas.hu == 7.0).any()


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_within_keeps_a_mass_inside_the_scan(z: float, radius: float) -> None:
    canvas = Canvas((6, 8, 8), (5.0, 2.0, 2.0), np.random.default_rng(0))
    moved = canvas.within(z, radius)
    assert abs(moved) + min(radius, 12.5) <= 12.5 + 1e-9
    if abs(z) + radius <= 12.5:
        assert moved == z


def test_noise_is_smooth_and_has_its_deviation() -> None:
    canvas = Canvas((24, 96, 96), (5.0, 3.0, 3.0), np.random.default_rng(1))
    noise = canvas.noise((8, 30, 30), 2.0)
    assert noise.shape == (24, 96, 96)
    assert noise.dtype == np.float32
    assert noise.std() == pytest.approx(2.0, rel=0.2)
    assert np.abs(np.diff(noise, axis=2)).mean() < 0.5 * noise.std()


@given(st.tuples(*[st.floats(-3.2, 3.2)] * 3))
def test_a_turn_keeps_lengths(angles: tuple[float, float, float]) -> None:
    turn = rotation(*angles)
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-9)
    axes = [np.full(1, value, dtype=np.float32) for value in (1.0, 2.0, 2.0)]
    assert sum(float(axis[0]) ** 2 for axis in turned(axes, turn)) == pytest.approx(9, rel=1e-4)


def test_a_quarter_turn_in_the_slice_swaps_the_sides() -> None:
    axes = [np.array([value], dtype=np.float32) for value in (1.0, 2.0, 3.0)]
    z, y, x = turned(axes, rotation(np.pi / 2, 0, 0))
    assert (float(z[0]), float(y[0]), float(x[0])) == pytest.approx((1, -3, 2), abs=1e-6)
