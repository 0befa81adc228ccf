"""Two processes under torchrun, over Gloo on the CPU, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from signal import SIGABRT, SIGKILL, SIGTERM
from typing import Any

import pytest
import torch
from rank_rounds import CASES, CROSS_ENTROPY, SETTINGS, terms_of
from rule_cards import rule_cards  # noqa: F401
from safetensors.torch import load_file

from flap_nvflare.bundle.round_files import Failure, RoundFolder
from flap_nvflare.bundle.torchrun import first_failure
from flap_nvflare.bundle.workflow import MULTI_GPU_CONFIG, TRAIN_CONFIG, build_work
from flap_nvflare.settings import Federation, Site

Tensors = dict[str, torch.Tensor]


pytestmark = pytest.mark.slow  # each process of a round imports for seconds


def torchrun(*arguments: str, folder: Path) -> str:
    """Runs two processes to their end and returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {name: value for name, value in os.environ.items() if name[:4] != "FLAP"}
    run = subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
        check=False, env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def results(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of the rounds of `rank_rounds`."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("rank_rounds.py")
    printed = torchrun(str(script), str(scans), str(folder), folder=folder)
    assert (folder / "told_1.json").exists(), printed[-3000:]
    return folder


def told(results: Path, rank: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((results / f"told_{rank}.json").read_text())
    return values


def one_process(site: Site, **changes: Any) -> tuple[list[dict[str, Any]], Tensors]:
    work = build_work(Federation.from_dict({**SETTINGS, **changes}), site)
    return [work.train(index).to_dict() for index in range(2)], work.adapter()


@pytest.mark.parametrize("case", sorted(CASES))
def test_both_processes_end_with_the_same_bytes(results: Path, case: str) -> None:
    first, second = (load_file(results / f"{case}_{rank}.safetensors") for rank in (0, 1))
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.isfinite(tensor).all(), name
    reports = [told(results, rank)[case] for rank in (0, 1)]
    for one, other in zip(*reports, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_the_same_seed_gives_the_same_bytes(results: Path) -> None:
    paths = [results / f"{name}_0.safetensors" for name in ("cross_entropy", "again")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert told(results, 0)["threads"] == SETTINGS["threads"]


# Weights move by hundredths here, AdamW's rate being 0.01. Sums in another order were found to
# set them apart by 1e-5, and gradients that are not weighed by rows by 0.1.
TOLERANCE = 1e-4


@pytest.mark.usefixtures("rule_cards")
@pytest.mark.parametrize("case", ["cross_entropy", "one_row", "by_turns"])
def test_a_mean_over_slices_trains_as_in_one_process(results: Path, site: Site, case: str) -> None:
    reports, one = one_process(site, **CASES[case])
    two = load_file(results / f"{case}_0.safetensors")
    start = build_work(Federation.from_dict({**SETTINGS, **CASES[case]}), site).adapter()
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 0.03
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=TOLERANCE), name
    for own, other in zip(told(results, 0)[case], reports, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert {**own, "loss": 0, "seconds": 0} == {**other, "loss": 0, "seconds": 0}


def test_local_terms_act_on_averaged_gradients(results: Path, site: Site) -> None:
    work = build_work(Federation.from_dict({**SETTINGS, **CROSS_ENTROPY}), site)
    work.terms.set(terms_of(work))
    work.train(0)
    for name, ours in (("terms", work.adapter()), ("mean", work.terms.mean())):
        first, second = (load_file(results / f"{name}_{rank}.safetensors") for rank in (0, 1))
        for key, tensor in ours.items():
            assert torch.equal(first[key], second[key]), key
            assert torch.allclose(tensor, first[key], rtol=1e-3, atol=TOLERANCE), key
    assert any(tensor.abs().max() > 0.01 for tensor in work.terms.mean().values())


def test_dice_by_process_trains_much_as_in_one_process(results: Path, site: Site) -> None:
    reports, one = one_process(site)
    two = load_file(results / "default_loss_0.safetensors")
    start = build_work(Federation.from_dict(SETTINGS), site).adapter()
    moved = sum(float((one[name] - start[name]).square().sum()) for name in one)
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    assert 0 < apart < 0.1 * moved  # 0.013 of it as found
    assert told(results, 0)["default_loss"][1]["loss"] == pytest.approx(reports[1]["loss"], rel=0.1)


def test_a_weight_without_gradient_stays_as_it_was(results: Path, site: Site) -> None:
    _, one = one_process(site, method="full")
    two = load_file(results / "full_0.safetensors")
    start = build_work(Federation.from_dict({**SETTINGS, "method": "full"}), site).adapter()
    still = [
        {name for name in tensors if torch.equal(tensors[name], start[name])}
        for tensors in (one, two)
    ]
    assert any("iou_prediction_head" in name for name in still[0])
    assert still[0] == still[1]


def test_both_processes_stop_at_the_same_step(results: Path) -> None:
    first, second = (told(results, rank)["stopped"] for rank in (0, 1))
    assert first == second
    assert first.startswith("site A, round 0: stopped as asked after step 1 of ")


def test_a_loss_that_is_no_number_in_one_ends_both(results: Path) -> None:
    first, second = (told(results, rank)["nan"] for rank in (0, 1))
    assert first == second
    assert first.startswith("site A, round 0, step 1 of ")


def test_the_bundle_runs_under_torchrun_and_the_first_process_writes(
    scans: Path, site: Site, tmp_path: Path
) -> None:
    values = {**SETTINGS, "dice_weight": 0.0}
    arguments = [f"--{name}={value}" for name, value in values.items()]
    printed = torchrun(
        "--module", "monai.bundle", "run",
        f"--config_file=['{TRAIN_CONFIG}','{MULTI_GPU_CONFIG}']",
        f"--data_root={scans}", "--site=A", "--device_name=cpu", "--profile=demo",
        "--output_dir=$'out' + __import__('os').environ['RANK']", *arguments,
        folder=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "out0" / "scores.json").exists(), printed[-3000:]
    assert {path.name for path in (tmp_path / "out0").iterdir()} == {
        "adapter_last.safetensors",
        "adapter_best.safetensors",
        "moments-00001.safetensors",
        "rounds.jsonl",
        "scores.json",
    }
    assert not list((tmp_path / "out1").iterdir())
    lines = (tmp_path / "out0" / "rounds.jsonl").read_text().splitlines()
    reports, _ = one_process(site, dice_weight=0.0)
    for line, report in zip(map(json.loads, lines), reports, strict=True):
        assert line["loss"] == pytest.approx(report["loss"], rel=1e-4)
        assert line["steps"] == report["steps"]


def test_the_failure_that_others_follow_from_is_named() -> None:
    broken = Failure(0, "RuntimeError: connection closed by peer", 1.0)
    killed = first_failure({0: 1, 1: -SIGKILL}, [broken])
    assert (killed.rank, killed.what) == (1, "killed by SIGKILL")
    assert first_failure({0: 1, 1: -SIGABRT}, [broken]).what == "killed by SIGABRT"
    assert first_failure({0: 1, 1: -SIGTERM}, [broken]) == broken
    ended = first_failure({0: -SIGTERM, 1: 3}, [])
    assert (ended.rank, ended.what) == (1, "exit code 3")
    assert first_failure({0: -SIGTERM, 1: -SIGTERM}, []).what == "killed by SIGTERM"


def test_failures_come_back_in_the_order_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RoundFolder(tmp_path)
    for rank, at in ((0, 2.0), (1, 1.0)):
        monkeypatch.setattr("flap_nvflare.bundle.round_files.time.time", lambda at=at: at)
        folder.fail(rank, KeyError(rank))
    assert [failure.rank for failure in folder.failures()] == [1, 0]
    assert folder.settled() is None
    folder.settle(folder.failures()[0])
    kinds = tuple(kind.__name__ for kind in KeyError.__mro__)
    assert folder.settled() == Failure(1, "KeyError: 1", 1.0, kinds)


def test_a_folder_is_abandoned_once_nobody_holds_its_lock(tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path)
    with folder.lock():
        assert not RoundFolder(tmp_path).abandoned()
    assert RoundFolder(tmp_path).abandoned()


def test_a_round_goes_through_the_folder_unchanged(
    federation: Federation, site: Site, tmp_path: Path
) -> None:
    asking, training = build_work(federation, site), build_work(federation, site)
    asking.train(0)
    folder = RoundFolder(tmp_path)
    folder.ask(asking, 1)
    assert RoundFolder(tmp_path).request() == (federation, site, 1)
    RoundFolder(tmp_path).start(training)
    report = training.train(1, progress=RoundFolder(tmp_path).tell)
    RoundFolder(tmp_path).answer(training, report)
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"half a line')
    assert [figures["step"] for figures in folder.progress()] == list(range(1, report.steps + 1))
    assert list(folder.progress()) == []
    taken = build_work(federation, site)
    assert folder.take(taken) == report
    asking.train(1)
    for name, tensor in asking.adapter().items():
        assert torch.equal(tensor, taken.adapter()[name])
    asking.save_state(tmp_path / "own.safetensors")
    taken.save_state(tmp_path / "taken.safetensors")
    assert (
        load_file(tmp_path / "own.safetensors").keys()
        == load_file(tmp_path / "taken.safetensors").keys()
    )
