"""The comparison of methods and baselines: cells kept, gone on with, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scan_files import write_sites

from flap_nvflare import comparison
from flap_nvflare.attack import ATTACKS
from flap_nvflare.combinations import check
from flap_nvflare.comparison_rows import ROWS, TABLES
from flap_nvflare.experiment import MODES
from flap_nvflare.settings import Federation

SETTINGS = ["base=random", "image_size=32", "rank=2", "rounds=1", "batch_size=4"]


def command(folder: Path, *more: str) -> list[str]:
    return [str(folder / "cells.jsonl"), "--data", str(folder), *more, "--set", *SETTINGS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sites(tmp_path, ("A", "B"))
    return tmp_path


def test_every_method_runs_and_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert comparison.main(command(folder, "--seeds", "0")) == 0
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert [cell["row"] for cell in cells] == list(TABLES["methods"])
    for cell in cells:
        assert set(cell["sites"]) == {"A", "B"}
        settings = Federation.from_dict(cell["federation"])
        for name, value in ROWS[cell["row"]].settings.items():
            assert getattr(settings, name) == value
    shown = capsys.readouterr().out.splitlines()
    methods, wire = shown[: 2 + len(cells)], shown[3 + len(cells) :]
    assert [line.split(" | ")[0] for line in methods[2:]] == [f"| {cell['row']}" for cell in cells]
    federated = [cell["row"] for cell in cells if ROWS[cell["row"]].mode == "federated"]
    assert [line.split(" | ")[0] for line in wire[2:]] == [f"| {row}" for row in federated]
    assert [cell["row"] for cell in cells if "wire" in cell] == federated
    by_row = {cell["row"]: cell for cell in cells}
    assert by_row["full"]["parameters"] > 10 * by_row["flap"]["parameters"]


def test_rows_have_one_name_each() -> None:
    assert sum(len(rows) for rows in TABLES.values()) == len(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_row_is_a_federation_that_makes_sense(name: str) -> None:
    row = ROWS[name]
    assert row.mode in MODES
    check(Federation.from_dict(dict(row.settings)))
    assert set(row.attacks.values()) <= set(ATTACKS)
    assert row.mode == "federated" or not row.attacks


def test_goes_on_where_it_stopped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--rows", "flap", "partial_decoder", "--seeds")
    assert comparison.main(command(folder, *rows, "0")) == 0
    first = (folder / "cells.jsonl").read_text()
    # As before there was a choice of grey values.
    first = first.replace(', "grey_values": "site"', "")
    (folder / "cells.jsonl").write_text(first)
    assert comparison.main(command(folder, *rows, "0", "1")) == 0
    lines = (folder / "cells.jsonl").read_text()
    assert lines.startswith(first)
    assert len(lines.splitlines()) == 4
    assert "| 2 |" in capsys.readouterr().out


def test_cells_of_other_settings_are_not_mixed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert comparison.main(command(folder, "--rows", "flap", "--seeds", "0")) == 0
    changed = command(folder, "--rows", "flap", "--seeds", "0")
    assert comparison.main([*changed, "rounds=2"]) == 1
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"), [("rank=0", "rank"), ("colour=red", "colour"), ("rank", "rank")]
)
def test_a_bad_setting_is_named(
    folder: Path, change: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert comparison.main([*command(folder, "--rows", "flap"), change]) == 1
    assert problem in capsys.readouterr().err


def without_seconds(line: str) -> dict[str, Any]:
    cell = json.loads(line)
    return {**cell, "seconds": 0, "wire": {**cell["wire"], "seconds": 0}}


def test_a_line_cut_off_by_a_kill_is_run_again(folder: Path) -> None:
    run = command(folder, "--rows", "flap", "partial_decoder", "--seeds", "0")
    assert comparison.main(run) == 0
    path = folder / "cells.jsonl"
    whole = path.read_text().splitlines()
    path.write_text(whole[0] + "\n" + whole[1][:80])
    assert comparison.main(run) == 0
    lines = path.read_text().splitlines()
    assert lines[:2] == [whole[0], whole[1][:80]]
    assert len(lines) == 3
    assert without_seconds(lines[2]) == without_seconds(whole[1])


def test_the_curve_has_a_point_for_every_round(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("--rows", "flap", "flap, each site alone", "flap, pooled data", "--seeds", "0")
    plain = [*command(folder, *rows), "rounds=2"]
    assert comparison.main(plain) == 0
    capsys.readouterr()
    curve = [*command(folder, "--curve", *rows), "rounds=2"]
    assert comparison.main(curve) == 0  # cells without a curve are run again
    shown = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    before, after = lines[:3], lines[3:]
    for one, other in zip(before, after, strict=True):
        assert one["sites"] == other["sites"]  # scoring on the way changes no byte
        assert [point["round"] for point in other["history"]] == [0, 1]
        seconds = [point["seconds"] for point in other["history"]]
        assert 0 < seconds[0] < seconds[1] < other["seconds"]
        assert set(other["history"][0]["dice"]) == {"kidney", "tumour", "mean"}
    # Three runs, of which one is a federation, and two rounds of each.
    heads = ("| run | parameters |", "| run | mean |", "| run | round | seconds |")
    begins = [0, 2 + 3 + 1, 2 + 3 + 1 + 2 + 1 + 1]
    assert all(shown[at].startswith(head) for at, head in zip(begins, heads, strict=True))
    assert [at for at, line in enumerate(shown) if not line] == [begins[1] - 1, begins[2] - 1]
    assert len(shown) == begins[2] + 2 + 6
    assert comparison.main(curve) == 0
    assert len((folder / "cells.jsonl").read_text().splitlines()) == 6


def test_a_site_without_a_figure_is_left_out() -> None:
    cells = [
        {
            "row": "flap",
            "parameters": 1,
            "mean": {"kidney": 0.5, "tumour": None},
            "sites": {"A": {"mean": None}, "B": {"mean": worst}},
        }
        for worst in (0.4, None)
    ]
    line = comparison.table(cells).splitlines()[-1]
    assert line == "| flap | 1 | 50.0 ± 0.0 | none | 40.0 | 2 |"


def test_table_gives_mean_and_deviation_over_seeds() -> None:
    cells = [
        {"row": "flap", "parameters": 1234, "mean": {"kidney": k}, "sites": {"A": {"mean": k}}}
        for k in (0.5, 0.7)
    ]
    assert comparison.table(cells).splitlines()[-1] == (
        "| flap | 1,234 | 60.0 ± 14.1 | 60.0 ± 14.1 | 2 |"
    )


def test_the_table_of_costs_gives_bytes_and_errors() -> None:
    cells = [
        {
            "row": "flap",
            "mean": {"mean": 0.5},
            "sites": {"A": {"mean": 0.4}},
            "wire": {"up": 1000.0, "down": 3000.0, "full": 8000, "error": e, "seconds": 0.25},
        }
        for e in (0.01, 0.03)
    ]
    assert comparison.wire_table(cells).splitlines()[-1] == (
        "| flap | 50.0 ± 0.0 | 40.0 ± 0.0 | 1,000 | 3,000 | 4.0 | 2.00% | 0.250 | 2 |"
    )
