"""Figures of a run, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_files import (
    DOWN,
    FULL_PARAMETERS,
    UP,
    round_line,
    score,
    write_alone,
    write_evaluation,
    write_run,
)

from flap_nvflare.report import figures, scores
from flap_nvflare.report.figures import Fault
from flap_nvflare.report.read import read_run
from flap_nvflare.report.summary import summary
from flap_nvflare.report.values import ReportError


def test_bytes_against_full_fine_tuning(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, ["A", "B"], rounds=3))
    total = figures.total_traffic(run)
    assert (total.up, total.down) == (3 * 2 * UP, 3 * 2 * DOWN)
    assert total.full == 4 * FULL_PARAMETERS * 3 * 2 * 2
    assert total.fewer == pytest.approx(2 * 4 * FULL_PARAMETERS / (UP + DOWN))
    assert figures.evaluation_bytes(run) == 7
    assert figures.site_bytes(run, "B") == (3 * UP, 3 * DOWN)


def test_a_site_that_sent_nothing_counts_on_neither_side(tmp_path: Path) -> None:
    line = round_line(0, ["A", "B"], bytes={"A": {"up": 5, "down": 6}, "B": {"up": 0, "down": 6}})
    run = read_run(write_run(tmp_path, ["A", "B"], lines=[line]))
    [(number, one)] = figures.traffic(run)
    assert (number, one.up, one.down) == (1, 5, 12)
    assert (one.full_up, one.full_down) == (4 * FULL_PARAMETERS, 8 * FULL_PARAMETERS)


def test_an_older_run_has_no_size_of_full_fine_tuning(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, ["A"], full_parameters=None))
    assert figures.total_traffic(run).fewer is None
    assert summary(run)["bytes"]["times_fewer"] is None


def test_dice_is_that_of_the_rounds_behind_the_adapter(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, ["A", "B"], rounds=2))
    by_site = figures.dice_by_site(run)
    # Round 1 scores nothing, round 2 what round 1 made, the end what round 2 made.
    assert by_site["A"] == [(1, pytest.approx(0.6)), (2, pytest.approx(0.8 - 0.4 / 3))]
    assert figures.mean_of_sites(by_site)[0] == (1, pytest.approx(0.595))


def test_dice_of_a_site_alone_is_that_after_its_round(tmp_path: Path) -> None:
    run = read_run(write_alone(tmp_path, rounds=2))
    assert figures.dice_by_site(run) == {"A": [(1, pytest.approx(0.4)), (2, pytest.approx(0.6))]}
    assert figures.total_traffic(run).total == 0
    assert summary(run)["kind"] == "alone"
    assert summary(run)["data"] == "unknown"
    assert summary(run)["dice"]["mean"] == pytest.approx(0.3)


def test_the_headline_is_the_mean_over_sites_with_the_worst(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["A", "B", "C"])
    matrix = {"best": {"A": score("A", 0.8), "B": score("B", 0.2), "C": score("C", 0.5)}}
    (folder / "cross_site.json").write_text(json.dumps(matrix))
    name, dice = scores.result_dice(read_run(folder))
    assert (name, dice.worst_site, dice.worst) == ("best", "B", pytest.approx(0.1))
    assert dice.mean == pytest.approx(0.25)
    assert dice.low is None


def test_an_evaluation_comes_before_the_runs_own_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["A", "B"])
    write_evaluation(folder, ["A", "B"])
    said = summary(read_run(folder))
    assert said["dice"] == {
        "split": "test", "model": "federated", "mean": 0.6, "low": pytest.approx(0.55),
        "high": pytest.approx(0.65), "worst": pytest.approx(0.5), "worst_site": "B",
    }  # fmt: skip
    assert said["collaborative_gain"] == 0.012
    assert said["evaluated"]


def test_models_side_by_side_are_the_federation_and_its_baselines(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["A", "B"])
    write_evaluation(folder, ["A", "B"])
    run = read_run(folder)
    found = [(name, note, one.mean) for name, note, one in scores.side_by_side(run)]
    assert found == [
        ("federated", "trained on A, B", 0.6),
        ("local only", "each site alone, at home", 0.47),
        ("pooled", "trained on A, B", 0.63),
        ("without_B", "trained on A", 0.58),
    ]
    assert scores.unseen(run) == [("B", "without_B", pytest.approx(0.29), pytest.approx(0.3))]


def test_the_matrix_has_the_runs_models_and_then_the_baselines(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["A", "B"])
    write_evaluation(folder, ["A", "B"])
    run = read_run(folder)
    found = scores.matrix(run)
    assert list(found) == [
        "best", "last", "site_A", "site_B", "local_A", "local_B", "pooled", "without_B",
    ]  # fmt: skip
    assert found["site_A"] == {"A": pytest.approx(0.302), "B": pytest.approx(0.307)}
    assert found["pooled"]["B"] == pytest.approx(0.315)
    assert {"site_A": "A", "local_B": "B"}.items() <= scores.home_of(run).items()


def test_without_baselines_the_sites_own_models_are_compared(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["A", "B"])
    write_evaluation(folder, ["A", "B"], local_only=None)
    values = json.loads((folder / "evaluation.json").read_text())
    ours = values["models"]["federated"]
    values["models"] = {"federated": ours, "site_A": {**ours, "kind": "adapter"}}
    (folder / "evaluation.json").write_text(json.dumps(values))
    assert [name for name, _, _ in scores.side_by_side(read_run(folder))] == [
        "federated",
        "A's own",
    ]


def test_faults_that_are_alike_are_one(tmp_path: Path) -> None:
    refused = [{"site": "B", "round": 0, "key": "x.lora_a", "reason": "holds NaN"}]
    lines = [
        round_line(0, ["A"], refused=refused, missing=["C"]),
        round_line(1, ["A"], refused=refused, excluded=["D"]),
    ]
    found = figures.faults(read_run(write_run(tmp_path, ["A", "B", "C", "D"], lines=lines)))
    assert found[0] == Fault("B", "refused", "x.lora_a", "holds NaN", (1, 2))
    assert [(one.site, one.what, one.rounds) for one in found[1:]] == [
        ("C", "no answer", (1,)),
        ("D", "left out by the rule", (2,)),
    ]


def test_epsilon_is_the_largest_of_the_last_statements(tmp_path: Path) -> None:
    lines = [round_line(index, ["A", "B"]) for index in range(2)]
    for index, line in enumerate(lines):
        for place, site in enumerate("AB"):
            spent = {"epsilon_replace": 3.0 + index + place, "secret": True}
            line["sites"][site]["privacy"] = spent
    run = read_run(write_run(tmp_path, ["A", "B"], lines=lines))
    assert figures.epsilon(run) == 5.0


def test_seconds_of_a_site_are_means_of_its_rounds(tmp_path: Path) -> None:
    lines = [round_line(index, ["A"]) for index in range(2)]
    lines[1]["sites"]["A"]["timings"]["steps"] = 8.5
    run = read_run(write_run(tmp_path, ["A"], lines=lines))
    assert figures.seconds_by_site(run)["A"]["steps"] == pytest.approx(7.5)
    assert figures.total_seconds(run) == 40.0


def test_a_killed_run_ends_at_its_broken_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["A"], rounds=3, finished=False)
    path = folder / "rounds.jsonl"
    path.write_text(path.read_text()[:-20])
    run = read_run(folder)
    assert (len(run.rounds), run.cut, run.finished, run.planned) == (2, True, False, 3)
    assert summary(run)["dice"]["mean"] is None
    assert summary(run)["bytes"]["evaluation"] == 0  # of a round that was lost, not of scores


@pytest.mark.parametrize(
    ("said", "synthetic", "expected"),
    [
        ("sites' own", [False, True], "synthetic"),  # one site is enough
        ("sites' own", [False, False], "sites' own"),
        ("unknown", [False, False], "sites' own"),  # run.json is written before the first answer
        ("unknown", [None, None], "unknown"),
        ("synthetic", [False, False], "synthetic"),
    ],
)
def test_one_synthetic_site_makes_a_run_synthetic(
    tmp_path: Path, said: str, synthetic: list[bool | None], expected: str
) -> None:
    line = round_line(0, ["A", "B"])
    for site, one in zip("AB", synthetic, strict=True):
        line["sites"][site]["synthetic"] = one
    assert read_run(write_run(tmp_path, ["A", "B"], lines=[line], data=said)).data == expected


def test_sites_are_in_the_order_that_people_count(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, ["site-10", "site-2", "B", "A"]))
    assert run.sites == ("A", "B", "site-2", "site-10")


def test_no_run_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no run's folder"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="no such folder"):
        read_run(tmp_path / "none")
    (write_run(tmp_path, ["A"]) / "cross_site.json").write_text("{")
    with pytest.raises(ReportError, match=r"cross_site\.json: no JSON"):
        read_run(tmp_path)
