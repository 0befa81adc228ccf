"""The command: the paper's parameter counts, phantoms, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_nvflare.cli import main

# arXiv 2407.21739 with ViT-B, 224 px, two classes, rank 32.
PAPER = {
    "full": 90_532_927,
    "attention": 31_681_152,
    "decoder": 3_902_195,
    "partial_decoder": 478_320,
    "lora": 1_368_064,
    "lora_decoder": 5_270_259,
    "flap": 1_846_384,
}


def test_count_gives_the_papers_integers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["method"]: row["parameters"] for row in rows} == PAPER
    assert all(row["bytes"] == 4 * row["parameters"] for row in rows)
    by_method = {row["method"]: row["reduction"] for row in rows}
    assert by_method["flap"] == pytest.approx(PAPER["full"] / PAPER["flap"])


def test_count_of_one_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "--classes", "1", "--json"]) == 0
    rows = {row["method"]: row["parameters"] for row in json.loads(capsys.readouterr().out)}
    assert (rows["full"], rows["flap"]) == (90_398_774, 1_712_488)


def test_count_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count"]) == 0
    assert "1,846,384" in capsys.readouterr().out


def test_phantom_writes_the_layout_of_kits(tmp_path: Path) -> None:
    assert main(["phantom", str(tmp_path / "scans"), "--sites", "D"]) == 0
    assert (tmp_path / "scans" / "thresholded_sites.csv").is_file()
    assert list((tmp_path / "scans").glob("case_*/imaging.nii.gz"))


@pytest.mark.parametrize(
    "arguments", [["count", "--image-size", "225"], ["phantom", "{real}"], ["count", "--rank", "0"]]
)
def test_a_bad_argument_gives_one_line_and_an_exit_code(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("a real folder")
    assert main([argument.format(real=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flap-nvflare ")
    assert error.count("\n") == 1
