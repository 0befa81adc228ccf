"""Means over seeds with intervals that a table of Student's t confirms."""

from __future__ import annotations

import pytest

from flap_nvflare.experiments.spread import Spread, spread


# Two-sided 95 % quantiles of Student's t as printed tables have them.
@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)])
def test_half_width_is_students(seeds: int, quantile: float) -> None:
    found = Spread(tuple(float(value) for value in range(seeds)))
    deviation = (seeds * (seeds + 1) / 12) ** 0.5  # of 0, 1, ..., n - 1
    assert found.deviation == pytest.approx(deviation)
    assert found.half == pytest.approx(quantile * deviation / seeds**0.5, rel=2e-4)


def test_three_seeds_by_hand() -> None:
    found = Spread((0.30, 0.36, 0.42))
    assert found.mean == pytest.approx(0.36)
    assert found.deviation == pytest.approx(0.06)
    assert found.half == pytest.approx(4.302653 * 0.06 / 3**0.5, rel=1e-6)


def test_one_seed_has_no_interval() -> None:
    found = Spread((0.5,))
    assert (found.mean, found.deviation, found.half) == (0.5, None, None)


def test_what_is_not_known_is_left_out() -> None:
    assert spread([0.2, None, float("nan"), 0.4]) == Spread((0.2, 0.4))
    assert spread([None, None]) is None
    with pytest.raises(ValueError, match="at least one"):
        Spread(())
