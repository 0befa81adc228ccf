"""Thirty rounds of a provisioned federation: no process of it grows with the rounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from memory_over_rounds import FIRST, PROCESSES, growth, measure, resident, small_federation


def test_the_growth_is_that_of_a_straight_line_after_the_first_rounds() -> None:
    start = [900.0, 0.0, 50.0, 7.0, 1.0]  # not counted
    assert len(start) == FIRST
    assert growth([*start, 10.0, 12.5, 15.0, 17.5]) == pytest.approx(2.5)
    assert growth([*start, 10.0, 10.0, 10.0]) == 0.0
    # By hand, about the middle: (-1.5 * 0 - 0.5 * 2 + 0.5 * 1 + 1.5 * 3) / 5.
    assert growth([*start, 0.0, 2.0, 1.0, 3.0]) == pytest.approx(0.8)


def test_memory_is_in_megabytes() -> None:
    before = resident(os.getpid())
    held = bytearray(b"1" * 50_000_000)
    assert resident(os.getpid()) - before == pytest.approx(50.0, abs=10.0)
    assert len(held) == 50_000_000


@pytest.mark.provisioned
@pytest.mark.timeout(900)
def test_no_process_grows_by_a_megabyte_a_round(tmp_path: Path) -> None:
    federation = small_federation(tmp_path, rounds=30)
    try:
        samples = measure(federation)
    finally:
        federation.stop()
    assert samples.keys() == PROCESSES.keys()
    assert {len(values) for values in samples.values()} == {29}
    grows = {name: growth(values) for name, values in samples.items()}
    assert all(slope < 1.0 for slope in grows.values()), grows
