"""The job under FLARE's real simulator: artifacts, bytes, refusal, equal seeds, equal adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from flap_nvflare.adapter.update import load_update
from flap_nvflare.experiment import federate
from flap_nvflare.settings import Federation, Site

SMALL = {"rounds": 2, "image_size": 64, "batch_size": 16, "foreground_fraction": 1.0}


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
        for figures in line["sites"].values():
            assert abs(figures["bytes_up"] / spec.bytes - 1) < 0.05
            assert abs(figures["bytes_down"] / spec.bytes - 1) < 0.05

    matrix = json.loads((run / "cross_site.json").read_text())
    assert set(matrix) == {"last", "best", "site_A", "site_B"}
    assert all(set(row) == {"A", "B"} for row in matrix.values())
    assert json.loads((run / "run.json").read_text())["data"] == "synthetic"
    assert "SYNTHETIC" in first.output()
    assert "Test Dice of the best adapter" in first.output()

    # The same federation without FLARE gives the same tensors, bit for bit.
    from flap_nvflare.bundle.workflow import build_work

    federation = Federation(**SMALL)
    flows = {
        name: build_work(federation, Site(name, first.home / "demo_kits", state_dir=tmp_path))
        for name in ("A", "B")
    }
    tensors = federate(flows, federation, tmp_path)
    found, _, _ = load_update(run / "adapter_last.safetensors")
    assert all(bool((found[name] == tensors[name]).all()) for name in tensors)


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
