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


def test_phantom_takes_a_number_of_sites_and_of_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ["--sites", "2", "--train", "1", "--test", "1"]
    knobs = [*counts, "--modality", "mr", "--labels", "2", "--seed", "3"]
    assert main(["phantom", str(tmp_path), *knobs]) == 0
    shown = capsys.readouterr()
    assert "S001, S002" in shown.out
    assert shown.err == ""
    assert len(list(tmp_path.glob("case_S00?_?000/segmentation.nii.gz"))) == 4
    manifest = json.loads((tmp_path / "PHANTOM.json").read_text())
    assert (manifest["modality"], manifest["labels"], manifest["sites"]) == ("mr", 2.0, 2)


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


def test_rules_give_every_card_and_the_papers_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    from flap_nvflare.aggregation import RULES

    assert main(["rules", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(rows) == sorted(RULES)
    head, a, b = 478_320, 32 * 22_016, 32 * 20_736
    assert rows["svd"]["bytes_up"] == rows["svd"]["bytes_down"] == 4 * PAPER["flap"]
    assert rows["ffa"]["bytes_up"] == 4 * (b + head)
    assert rows["share_a"]["bytes_up"] == 4 * (a + head)
    assert rows["core"]["bytes_up"] == 4 * (38 * 32**2 + head)
    assert rows["alternate"]["bytes_up"] == 2 * (a + b + 2 * head)
    assert rows["alternate"]["bytes_down"] == 4 * PAPER["flap"]
    for name, row in rows.items():
        card = RULES[name].CARD
        assert (row["paper"], row["exact"], row["linear"]) == (card.paper, card.exact, card.linear)
        assert (row["bytes_down_most"] > row["bytes_down"]) == card.offset
        # What alternates is linear as well, but its two factors come in different rounds.
        open_to_it = card.linear and card.trains != "alternate"
        assert ("encryption: he" in row["excludes"]) == (not open_to_it)


def test_an_offset_is_bounded_by_the_rank_that_a_matrix_can_have() -> None:
    from flap_nvflare.rules_table import sizes

    # 24 adapters of the encoder, 768 x 768; 14 of the decoder, none above 256 x 256.
    expected = 24 * 768 * 1536
    assert sizes().offset > expected
    assert sizes().offset - expected < 14 * 256 * 512
    assert sizes().head + sizes().a + sizes().b == PAPER["flap"]


def test_rules_as_a_table_say_what_they_exclude(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    text = capsys.readouterr().out
    assert "7,385,536" in text
    assert "not with encryption: he: the server sees encrypted sums only" in text


def test_a_stop_from_the_keyboard_gives_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flap_nvflare.sam.tuning.count", stop)
    assert main(["count"]) == 130
    assert capsys.readouterr().err == "flap-nvflare count: stopped from the keyboard\n"
