"""Which run a job goes on with, and who may write into its folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from test_server_job import SITES, finish_round, home
from wire import SETTINGS

from flap_nvflare.flare.job import ServerJob, open_job
from flap_nvflare.flare.run import RunFolder
from flap_nvflare.settings import SettingsError

__all__ = ["home"]  # a fixture


def begun(simulated: bool = False, name: str = "fed_kits", **changes: Any) -> ServerJob:
    """A job that was submitted, with its first files written."""
    context = FLContext()
    context.set_prop(FLContextKey.SIMULATE_MODE, simulated, private=True, sticky=False)
    job = open_job(context, name, {**SETTINGS.to_dict(), **changes}, SITES)
    job.write_description()
    return job


@pytest.fixture
def broken_off(monkeypatch: pytest.MonkeyPatch) -> ServerJob:
    """A run of which one round was finished."""
    monkeypatch.setattr("time.strftime", lambda form: "first")
    job = begun()
    finish_round(job, 0)
    monkeypatch.setattr("time.strftime", lambda form: "second")
    return job


def test_the_same_job_again_goes_on_after_the_last_finished_round(broken_off: ServerJob) -> None:
    again = begun()
    assert again.folder.path == broken_off.folder.path
    assert again.start_round == 1


def test_it_may_wait_longer_and_have_more_rounds(broken_off: ServerJob) -> None:
    assert begun(rounds=9, train_timeout=77, min_sites=2).start_round == 1


@pytest.mark.parametrize("changes", [{"seed": 7}, {"rule": "mean"}, {"rank": 1}])
def test_other_settings_are_another_run(broken_off: ServerJob, changes: dict[str, Any]) -> None:
    again = begun(**changes)
    assert again.folder.path.name == "second"
    assert again.start_round == 0


def test_a_finished_run_is_left_alone(broken_off: ServerJob) -> None:
    broken_off.write_description({})
    assert begun().folder.path.name == "second"


def test_without_a_finished_round_there_is_nothing_to_go_on_with(broken_off: ServerJob) -> None:
    broken_off.folder.adapter_path("adapter_last").unlink()
    assert begun().folder.path.name == "second"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"finished": false}'])
def test_a_description_that_was_cut_off_stops_no_job(broken_off: ServerJob, text: str) -> None:
    (broken_off.folder.path / "run.json").write_text(text)
    assert begun().folder.path.name == "second"


def test_the_simulator_starts_anew(broken_off: ServerJob) -> None:
    assert begun(simulated=True).folder.path.name == "second"


def test_new_is_new(broken_off: ServerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAP_RESUME", "new")
    assert begun().folder.path.name == "second"


@pytest.mark.parametrize("name", ["../fed_kits", "/tmp/fed_kits", "..", ".", "", "a.b", "a/b", "ä"])
def test_a_jobs_name_leads_nowhere_else(home: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="name of the runs"):
        begun(name=name)
    assert not list(home.rglob("run.json"))


def test_no_two_processes_write_into_a_run(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib, time\n"
            "from flap_nvflare.flare.run import RunFolder\n"
            "folder = RunFolder(pathlib.Path(sys.argv[1]))\n"
            "folder.hold()\n"
            "print('held', flush=True)\n"
            "time.sleep(600)\n",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match="another process writes into this run"):
            RunFolder(tmp_path).hold(seconds=0.2)
    finally:
        holder.kill()
        holder.wait(30)
    RunFolder(tmp_path).hold(seconds=5)  # however the other has ended


def test_the_administrator_gets_the_artifacts_and_not_the_servers_memory(
    broken_off: ServerJob, tmp_path: Path
) -> None:
    result = tmp_path / "job" / "flap"
    broken_off.folder.publish(result)
    assert sorted(path.name for path in result.iterdir()) == [
        "adapter_last.safetensors",
        "rounds.jsonl",
        "run.json",
    ]
