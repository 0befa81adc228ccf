"""The bundle run by MONAI's own command, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flap_nvflare.adapter.update import load_update
from flap_nvflare.bundle.workflow import (
    CONFIGS,
    METADATA,
    TRAIN_CONFIG,
    build_work,
    config_values,
)
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.scores import SiteScore

EVALUATE_CONFIG = CONFIGS / "evaluate.yaml"


def run_bundle(config: Path, folder: Path, **values: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config)]
    for name, value in values.items():
        command += [f"--{name}", str(value)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def values(scans: Path, federation: Federation) -> dict[str, Any]:
    own = federation.to_dict()
    changed = {name: own[name] for name, default in Federation().to_dict().items()
               if own[name] != default}  # fmt: skip
    return {"data_root": scans, "site": "A", "device_name": "cpu", **changed}


def test_a_site_trains_alone_and_equals_the_federations_workflow(
    tmp_path: Path, values: dict[str, Any], federation: Federation, site: Site
) -> None:
    run = run_bundle(TRAIN_CONFIG, folder=tmp_path, output_dir="out", profile="demo", **values)
    out = tmp_path / "out"
    assert out.is_dir(), run.stdout + run.stderr
    assert {path.name for path in out.iterdir()} == {
        "adapter_last.safetensors",
        "adapter_best.safetensors",
        "moments-00001.safetensors",
        "rounds.jsonl",
        "scores.json",
    }
    tensors, spec, extra = load_update(out / "adapter_last.safetensors")
    assert extra["round"] == "1"

    workflow = build_work(federation, site)
    reports = [workflow.train(index) for index in range(federation.rounds)]
    own = workflow.adapter()
    assert spec == workflow.spec()
    assert list(tensors) == list(own)
    assert all(torch.equal(tensors[name], own[name]) for name in own)

    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [(line["round"], line["loss"]) for line in lines] == [
        (index, report.loss) for index, report in enumerate(reports)
    ]
    scores = json.loads((out / "scores.json").read_text())
    for split in ("validation", "test"):
        assert SiteScore.from_dict(scores[split]).cases == workflow.evaluate(split).cases
    assert Federation.from_dict(scores["federation"]) == federation

    from monai.bundle import run as run_here

    run_here(
        config_file=[str(TRAIN_CONFIG), str(EVALUATE_CONFIG)],
        logging_file=False,
        output_dir=str(tmp_path / "out2"),
        profile="demo",
        adapter_file=str(out / "adapter_last.safetensors"),
        **{**values, "data_root": str(values["data_root"])},
    )
    again = json.loads((tmp_path / "out2" / "scores.json").read_text())
    assert again["test"]["cases"] == scores["test"]["cases"]


def test_the_config_passes_every_setting_by_its_own_name() -> None:
    config = config_values()
    passed = dict(config["federation"])
    assert passed.pop("_target_") == "flap_nvflare.bundle.builders.make_federation"
    assert passed.pop("profile") == "@profile"
    assert passed == {name: f"@{name}" for name in passed}
    assert passed.keys() <= Federation().to_dict().keys()
    assert all(config[name] is None for name in passed)
    for name in ("arch", "method", "rank", "rounds", "learning_rate", "dice_weight", "seed"):
        assert name in passed


def test_metadata_has_what_monai_asks_of_a_bundle(values: dict[str, Any]) -> None:
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        str(TRAIN_CONFIG),
        meta_file=str(METADATA),
        logging_file=False,
        workflow_type="train",
        profile="demo",
        **{**values, "data_root": str(values["data_root"])},
    )
    workflow.initialize()
    assert not workflow.check_properties()
    assert len(workflow.train_dataset) == 8
    assert workflow.version == "0.1.0"
