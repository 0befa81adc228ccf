"""The run's folder at the server."""

from __future__ import annotations

from pathlib import Path

from flap_nvflare.flare.run import RunFolder


def test_only_what_the_job_wrote_is_handed_out(tmp_path: Path) -> None:
    run, handed_out = tmp_path / "run", tmp_path / "flap"
    results = {
        "adapter_best.safetensors",
        "adapter_last.safetensors",
        "cross_site.json",
        "mlflow.db",
        "rounds.jsonl",
        "run.json",
        "sites/A.safetensors",
        "tensorboard/A/events",
    }
    # An evaluation's files name cases; the page has their pictures in it.
    others = {
        "baselines/A/adapter.safetensors",
        "evaluation.json",
        "masks/case_00001.nii.gz",
        "pictures/federated/case_00001.png",
        "report.html",
        "server_3.safetensors",
        "sites/.A.tmp",
        ".lock",
    }
    for name in results | others:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name, encoding="utf-8")
    RunFolder(run).publish(handed_out)
    found = {
        path.relative_to(handed_out).as_posix() for path in handed_out.rglob("*") if path.is_file()
    }
    assert found == results
