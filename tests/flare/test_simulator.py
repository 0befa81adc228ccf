"""The job under FLARE's real simulator: artifacts, bytes, refusal, equal seeds, equal adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import stop
from safetensors.torch import load_file

from flap_nvflare.adapter.update import load_update
from flap_nvflare.in_process import federate
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.site_round import SiteRound

SMALL = {"rounds": 2, "image_size": 64, "batch_size": 16, "foreground_fraction": 1.0}
TINY = {"rounds": 2, "image_size": 32, "local_epochs": 1}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_sites_make_every_artifact_and_equal_the_run_in_one_process(
    simulation: Callable, tmp_path: Path
) -> None:
    first = simulation("first", changes=SMALL)
    run = first.run()
    names = {path.name for path in run.iterdir()}
    assert {
        "adapter_last.safetensors",
        "adapter_best.safetensors",
        "rounds.jsonl",
        "cross_site.json",
        "run.json",
    } <= names, first.output()[-4000:]

    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [0, 1]
    assert all(set(line["sites"]) == {"A", "B"} and not line["refused"] for line in rounds)
    assert rounds[1]["validation_dice_received"] is not None

    # The best adapter is the one with the best mean Dice on validation cases.
    _, spec, chosen = load_update(run / "adapter_best.safetensors")
    assert float(chosen["score"]) >= rounds[1]["validation_dice_received"]
    assert int(chosen["rounds"]) in (1, 2)
    for line in rounds:
        assert line["taking_part"] == ["A", "B"]
        assert line["excluded"] == []
        for site, figures in line["sites"].items():
            ways = {"up": figures["bytes_up"], "down": figures["bytes_down"]}
            assert line["bytes"][site] == ways
            assert abs(figures["bytes_up"] / spec.bytes - 1) < 0.05
            assert abs(figures["bytes_down"] / spec.bytes - 1) < 0.05

    matrix = json.loads((run / "cross_site.json").read_text())
    assert set(matrix) == {"last", "best", "site_A", "site_B"}
    assert all(set(row) == {"A", "B"} for row in matrix.values())
    assert json.loads((run / "run.json").read_text())["data"] == "synthetic"
    assert "SYNTHETIC" in first.output()
    assert "Test Dice of the best adapter" in first.output()

    federation = Federation(**SMALL)
    same_without_flare(first, run, federation, tmp_path)


def same_without_flare(simulated: Any, run: Path, federation: Federation, folder: Path) -> None:
    """The federation in one process gives what the run left, bit for bit."""
    from flap_nvflare.bundle.workflow import build_work

    sites = {}
    for name in simulated.sites:
        site = Site(name, simulated.home / "demo_kits", state_dir=folder)
        sites[name] = SiteRound(build_work(federation, site), folder / "sites" / name)
    state = federate(sites, federation).state
    last = load_file(run / "adapter_last.safetensors")
    server = load_file(run / f"server_{federation.rounds}.safetensors")
    control = {f"control/{name}": value for name, value in state.control.items()}
    memory = {f"memory/{name}": value for name, value in state.memory.items()}
    assert last.keys() == {*state.tensors, *state.offset}
    for found, expected in (
        (last, {**state.tensors, **state.offset}),
        (server, {**control, **memory}),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.long
def test_forked_sites_give_the_run_in_one_process(simulation: Callable, tmp_path: Path) -> None:
    settings = {**TINY, "rounds": 1}
    forked = simulation("forked", changes=settings)
    # One thread for two sites: train and validate have a process each.
    run = forked.finish(forked.start(threads=1, forked=True))
    assert len(forked.lines(run)) == 1, forked.output()[-4000:]
    same_without_flare(forked, run, Federation(**settings), tmp_path)


@pytest.mark.slow
def test_an_offset_and_control_variates_are_those_of_one_process(
    simulation: Callable, tmp_path: Path
) -> None:
    changes = {**TINY, "rule": "residual", "optimizer": "scaffold", "cross_site": "global"}
    residual = simulation("residual", changes=changes)
    run = residual.run()
    assert [line["refused"] for line in residual.lines(run)] == [[], []]
    assert any(".offset_b" in name for name in load_file(run / "adapter_last.safetensors"))
    same_without_flare(residual, run, Federation(**changes), tmp_path)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("stack", marks=pytest.mark.long),
        pytest.param("share_a", marks=pytest.mark.slow),
        pytest.param("core", marks=pytest.mark.long),
        pytest.param("alternate", marks=pytest.mark.long),
    ],
)
def test_a_rule_that_trains_or_sends_other_parts_runs_to_its_end(
    simulation: Callable, rule: str
) -> None:
    one = simulation(rule, changes={**TINY, "rule": rule, "cross_site": "all"})
    run = one.run()
    lines = one.lines(run)
    assert [line["round"] for line in lines] == [0, 1], one.output()[-4000:]
    assert all(set(line["sites"]) == {"A", "B"} and not line["refused"] for line in lines)
    matrix = json.loads((run / "cross_site.json").read_text())
    assert set(matrix) == {"last", "best", "site_A", "site_B"}
    assert all(set(row) == {"A", "B"} for row in matrix.values())
    last = load_file(run / "adapter_last.safetensors")
    assert any(".lora_a" in name for name in last)
    # What a rule leaves at its sites is in no file of the server.
    assert any(".lora_b" in name for name in last) == (rule != "share_a")
    assert any(".lora_core" in name for name in last) == (rule == "core")
    assert any(".offset_b" in name for name in last) == (rule == "stack")
    up = [line["sites"]["A"]["bytes_up"] for line in lines]
    down = [line["sites"]["A"]["bytes_down"] for line in lines]
    if rule == "alternate":  # one of the factors goes up, both come down
        assert max(up) < min(down)
    if rule == "stack":  # the change of the base comes with the second round
        assert up[0] == pytest.approx(up[1], rel=0.01)
        assert down[1] > 1.1 * down[0]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_process_for_every_task_and_the_recipe_give_the_same_bytes(simulation: Callable) -> None:
    kept = simulation("kept", changes=SMALL).run(threads=2)
    anew = simulation("anew", changes=SMALL).run(threads=1)
    recipe = simulation("recipe", changes=SMALL)
    python = recipe.finish(recipe.start_recipe())
    for name in ("adapter_last", "adapter_best"):
        (digest,) = {sha256(run / f"{name}.safetensors") for run in (kept, anew, python)}
        assert digest
    assert "Test Dice of the best adapter" in recipe.output()


def test_without_the_papers_data_a_bad_data_root_stops_the_job(simulation: Callable) -> None:
    broken = simulation("broken", changes=SMALL)
    run = broken.run(FLAP_DATA_ROOT="/no/such/folder")
    assert not (run / "adapter_last.safetensors").exists()
    assert "/no/such/folder" in broken.output()


def test_settings_that_make_no_sense_together_stop_the_job_before_a_site_is_asked(
    simulation: Callable,
) -> None:
    changes = {"rule": "stack", "optimizer": "fedadam"}
    nonsense = simulation("nonsense", changes=changes, sites=("A",))
    process = nonsense.start()
    try:
        process.wait(240)
    finally:
        stop(process)
    assert "SettingsError: setting optimizer: fednova, scaffold, fedavgm" in nonsense.output()
    assert "does not go with rule: stack" in nonsense.output()
    assert "Round 0 started" not in nonsense.output()
    assert not (nonsense.home / "runs").exists()
