"""Outlines that are moved: by how much, and what stays inside what."""

from __future__ import annotations

import numpy as np
import pytest

from flap_nvflare.data.outlines import moved


def disc(radius: float, pixel: tuple[float, float], shift: float = 0.0) -> np.ndarray:
    y, x = ((np.arange(n) - n / 2 + 0.5) * p for n, p in zip((96, 80), pixel, strict=True))
    return (y[:, None] ** 2 + (x[None] - shift) ** 2 < radius**2).astype(np.uint8)


@pytest.mark.parametrize("mm", [-6.0, -3.0, -1.5, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("pixel", [(2.4, 2.4), (0.8, 0.8), (1.5, 1.0)])
def test_an_outline_moves_by_the_mm(mm: float, pixel: tuple[float, float]) -> None:
    radius = 12 * pixel[0]
    mask = np.stack([disc(radius, pixel), disc(0, pixel)])
    area = float((moved(mask, (5.0, *pixel), mm)[0] > 0).sum()) * pixel[0] * pixel[1]
    assert (area / np.pi) ** 0.5 - radius == pytest.approx(mm, abs=0.45 * max(pixel))
    assert not moved(mask, (5.0, *pixel), mm)[1].any()


def test_a_tumour_stays_in_the_foreground_and_classes_keep_their_border() -> None:
    kidney, tumour = disc(40, (2.4, 2.4)), disc(20, (2.4, 2.4), shift=32)
    mask = np.where(tumour > 0, 2, kidney)[None].astype(np.uint8)
    for mm in (-4.0, 4.0):
        result = moved(mask, (5.0, 2.4, 2.4), mm)
        both = (mask > 0) & (result > 0)
        assert np.array_equal(result[both], mask[both])
        assert set(np.unique(result)) == {0, 1, 2}
        assert ((result > 0) >= (mask > 0)).all() if mm > 0 else (mask > 0)[result > 0].all()
    assert moved(mask, (5.0, 2.4, 2.4), 0.0) is mask
