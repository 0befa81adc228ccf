"""Where a round's seconds went, from lines worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flap_nvflare.bench.whole_round import main, spent, table

LINE: dict[str, Any] = {
    "round": 0,
    "seconds": 20.0,
    "aggregation_seconds": 1.0,
    "sites": {
        "A": {"timings": {"open": 0.5, "evaluate": 1.0, "read": 0.5, "steps": 8.0, "save": 0.1}},
        "B": {"timings": {"open": 0.5, "evaluate": 1.0, "read": 0.5, "steps": 13.5, "save": 0.5}},
    },
}


def test_the_slowest_site_is_followed() -> None:
    found = spent(LINE)
    assert found["steps"] == 13.5
    assert found["rest"] == pytest.approx(3.0)
    assert sum(found.values()) == pytest.approx(20.0)


def test_a_round_without_timings_is_named() -> None:
    with pytest.raises(ValueError, match="round 0: no site told"):
        spent({**LINE, "sites": {"A": {}}})


def test_the_table_adds_up_the_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "| training steps | 27.0 | 67.5% |" in table([LINE, LINE])
    (tmp_path / "rounds.jsonl").write_text(json.dumps(LINE) + "\n")
    assert main([str(tmp_path)]) == 0
    assert "1 rounds, 20.0 s" in capsys.readouterr().out
    assert main([str(tmp_path / "none")]) == 1
    assert "rounds.jsonl" in capsys.readouterr().err
