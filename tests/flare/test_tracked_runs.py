"""One word in the job or in the recipe: real runs, shown as `rounds.jsonl` has them, to the figure.

FLARE's simulator writes into TensorBoard's files, a recipe that goes on into MLflow's database.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shown import in_lines, in_mlflow, in_tensorboard, mlflow_runs

from flap_nvflare.flare.figures import ALL_SITES

TINY = {"image_size": 32, "local_epochs": 1, "cross_site": "global"}


@pytest.mark.long
def test_a_job_is_shown_in_tensorboard(simulation: Callable) -> None:
    changes = {**TINY, "rounds": 2, "tracking": "tensorboard"}
    one = simulation(sites=("A",), changes=changes)
    run = one.run()
    shown = in_tensorboard(run)
    assert shown == in_lines(one.lines(run))
    assert {site for site, _ in shown} == {"A", ALL_SITES}
    # With the job's results, where the administrator downloads them.
    (published,) = (one.folder / "work").rglob("flap/tensorboard")
    assert in_tensorboard(published.parent) == shown


@pytest.mark.long
def test_a_recipe_that_goes_on_is_shown_in_mlflow(simulation: Callable) -> None:
    one = simulation(sites=("A",), changes={**TINY, "rounds": 1, "tracking": "mlflow"})
    one.finish(one.start_recipe())
    one.changes = {**one.changes, "rounds": 2}
    run = one.finish(one.start_recipe(FLAP_RESUME="last"))
    uri = f"sqlite:///{run / 'mlflow.db'}"
    shown = in_mlflow(uri)
    assert shown == in_lines(one.lines(run)), one.output()[-3000:]
    assert [step for step, _ in shown["A", "loss"]] == [0, 1]
    _, runs = mlflow_runs(uri)
    assert {found.info.status for found in runs} == {"FINISHED"}
