"""What a person sees in TensorBoard and MLflow: figures by site and name, each with its rounds."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from flap_nvflare.flare.figures import round_figures

Curves = dict[tuple[str, str], list[tuple[int, float]]]


def in_tensorboard(run: Path) -> Curves:
    """The scalars of every event file in a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in sorted((run / "tensorboard").iterdir()):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[folder.name, tag] = [(one.step, one.value) for one in events.Scalars(tag)]
    return found


def mlflow_runs(uri: str, experiment: str = "fed_kits") -> tuple[Any, list[Any]]:
    """A client, and the MLflow runs of the experiment."""
    from mlflow.tracking.client import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    return client, list(client.search_runs([found.experiment_id]))


def in_mlflow(uri: str) -> Curves:
    """The metrics of every MLflow run; two runs of one site stand one after the other."""
    client, runs = mlflow_runs(uri)
    found = defaultdict(list)
    for run in runs:
        for name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            tag = re.sub(":(..)", lambda code: chr(int(code[1], 16)), name)
            found[run.data.tags["site"], tag] += sorted((one.step, one.value) for one in history)
    return dict(found)


def in_lines(lines: list[dict[str, Any]]) -> Curves:
    """The same of `rounds.jsonl`; floats as 32 bits hold them, as TensorBoard does."""
    found = defaultdict(list)
    for line in lines:
        for site, figures in round_figures(line).items():
            for name, figure in figures.items():
                value = pytest.approx(figure, rel=1e-6, abs=1e-12)
                found[site, name].append((line["round"], value))
    return dict(found)
