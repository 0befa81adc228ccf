"""Whether FLARE calls the gate: a job's filters are matched to tasks by their exact names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flap_nvflare.flare import messages
from flap_nvflare.flare.coding import (
    DecodeAdapter,
    DecodeUpdate,
    EncodeAdapter,
    EncodeUpdate,
    PrivacyFilter,
)
from flap_nvflare.flare.encryption import DecryptAdapter, EncryptUpdate
from flap_nvflare.flare.filters import AdapterOnlyFilter
from flap_nvflare.flare.recipe import FlapRecipe

JOBS = Path(__file__).parents[2] / "jobs"
ALL_TASKS = {messages.TRAIN, messages.VALIDATE, messages.SUBMIT_MODEL}
CLIENT, SERVER = "config_fed_client.json", "config_fed_server.json"


def chains(path: Path, kind: str) -> list[tuple[set[str], list[tuple[str, dict]]]]:
    """The filter chains of a config: their tasks, and class and arguments of each filter."""
    return [
        (
            set(chain["tasks"]),
            [(one["path"].rsplit(".", 1)[1], one.get("args", {})) for one in chain["filters"]],
        )
        for chain in json.loads(path.read_text(encoding="utf-8")).get(kind, [])
    ]


def by_task(path: Path, kind: str, task: str) -> list[tuple[str, dict]]:
    """The filters that FLARE runs for a task, in its order."""
    return [one for tasks, filters in chains(path, kind) if task in tasks for one in filters]


@pytest.fixture(params=["recipe", *sorted(path.name for path in JOBS.iterdir())])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The folder with the config of a job in this project, or of the recipe's."""
    if request.param != "recipe":
        yield JOBS / request.param / "app" / "config"
        return
    FlapRecipe().export(job_dir=str(tmp_path))
    (server,) = tmp_path.rglob(SERVER)
    yield server.parent


@pytest.mark.parametrize("task", sorted(ALL_TASKS))
def test_every_message_of_a_site_passes_the_gate(config: Path, task: str) -> None:
    (client,) = config.parent.parent.rglob(CLIENT)
    outward = by_task(client, "task_result_filters", task)
    names = [name for name, _ in outward]
    # What is coded is private already; after the gate it can only be sealed.
    assert names == [
        PrivacyFilter.__name__,
        EncodeUpdate.__name__,
        AdapterOnlyFilter.__name__,
        EncryptUpdate.__name__,
    ]
    assert not outward[-2][1].get("offset", False)
    inward = by_task(client, "task_data_filters", task)
    assert [name for name, _ in inward] == [
        DecryptAdapter.__name__,
        AdapterOnlyFilter.__name__,
        DecodeAdapter.__name__,
    ]
    assert inward[1][1]["offset"] is True


def test_the_server_codes_what_is_trained_and_nothing_else(config: Path) -> None:
    (server,) = config.parent.parent.rglob(SERVER)
    train = {messages.TRAIN}
    assert [(tasks, [name for name, _ in filters])
            for tasks, filters in chains(server, "task_data_filters")
            ] == [(train, [EncodeAdapter.__name__])]  # fmt: skip
    assert [(tasks, [name for name, _ in filters])
            for tasks, filters in chains(server, "task_result_filters")
            ] == [(train, [DecodeUpdate.__name__])]  # fmt: skip


def test_no_list_of_tasks_has_a_name_that_matches_nothing(config: Path) -> None:
    for name in (CLIENT, SERVER):
        (path,) = config.parent.parent.rglob(name)
        for kind in ("task_data_filters", "task_result_filters"):
            for tasks, _ in chains(path, kind):
                assert tasks <= ALL_TASKS


@pytest.mark.slow
def test_no_update_passes_a_gate_of_another_method(simulation: Callable) -> None:
    closed = simulation(
        "closed", changes={"rounds": 1, "image_size": 32, "local_epochs": 1, "train_timeout": 90}
    )
    path = closed.config(CLIENT)
    values = json.loads(path.read_text(encoding="utf-8"))
    (chain,) = values["task_result_filters"]
    assert chain["filters"][-2]["path"].endswith(AdapterOnlyFilter.__name__)
    chain["filters"][-2]["args"] = {"method": "partial_decoder"}
    path.write_text(json.dumps(values), encoding="utf-8")

    run = closed.run()
    # A site trained, its update was stopped, and nothing was made of it.
    assert "round 1/1 step 11/11" in closed.output()
    assert "TASK_RESULT_FILTER_ERROR" in closed.output()
    assert "is not among those of method 'partial_decoder' and may not travel" in closed.output()
    assert "updates, rule" not in closed.output()
    assert not (run / "rounds.jsonl").exists()
    assert not list(run.rglob("*.safetensors"))
