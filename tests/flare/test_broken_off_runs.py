"""Which run a job goes on with, and who may write into its folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def begun(
    simulated: bool = False, name: str = "fed_kits", sites: tuple[str, ...] = SITES, **changes: Any
) -> ServerJob:
    """A job that was submitted, with its first files written."""
    context = FLContext()
    context.set_prop(FLContextKey.SIMULATE_MODE, simulated, private=True, sticky=False)
    job = open_job(context, name, {**SETTINGS.to_dict(), **changes}, sites)
    job.write_description()
    return job


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """Another process that writes into the run, until it is killed."""
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
            str(folder),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.kill()
        holder.wait(30)


@pytest.fixture
def broken_off(monkeypatch: pytest.MonkeyPatch) -> ServerJob:
    """A run of which one round was finished."""
    monkeypatch.setattr("time.strftime", lambda *_: "first")
    job = begun()
    finish_round(job, 0)
    job.folder.release()  # its process has ended
    monkeypatch.setattr("time.strftime", lambda *_: "second")
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


def test_other_hospitals_do_not_go_on_with_it(broken_off: ServerJob) -> None:
    assert begun(sites=("A", "B", "D")).folder.path.name == "second"


def test_without_one_of_its_sites_it_says_so_and_waits(broken_off: ServerJob) -> None:
    with pytest.raises(SettingsError, match=r"\['C'\] are not connected; start them"):
        begun(sites=("A", "B"))
    assert begun().start_round == 1


def test_min_sites_says_that_the_others_suffice(broken_off: ServerJob) -> None:
    again = begun(sites=("A", "B"), min_sites=2)
    assert (again.start_round, again.quorum) == (1, 2)


def test_another_base_is_another_run(broken_off: ServerJob) -> None:
    path = broken_off.folder.path / "run.json"
    path.write_text(path.read_text().replace(broken_off.spec.base_sha256, "0" * 64))
    assert begun().folder.path.name == "second"


def test_fewer_rounds_than_are_finished_are_another_run(broken_off: ServerJob) -> None:
    finish_round(broken_off, 1)
    assert begun(rounds=1).folder.path.name == "second"


def test_a_run_under_way_is_left_alone(broken_off: ServerJob) -> None:
    with held_by_another(broken_off.folder.path):
        assert begun().folder.path.name == "second"


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
    another = pytest.raises(TimeoutError, match="another process writes into this run")
    with held_by_another(tmp_path), another:
        RunFolder(tmp_path).hold(seconds=0.2)
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
