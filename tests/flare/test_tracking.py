"""Figures in TensorBoard and MLflow are those of `rounds.jsonl`, also in a run that goes on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from shown import Curves, in_lines, in_mlflow, in_tensorboard, mlflow_runs
from wire import SETTINGS

from flap_nvflare.adapter.guard import Refusal
from flap_nvflare.flare import tracking
from flap_nvflare.flare.figures import ALL_SITES
from flap_nvflare.flare.job import ServerJob, open_job, save_round
from flap_nvflare.flare.recipe import FlapRecipe
from flap_nvflare.flare.tracking import Tracking, start_tracking
from flap_nvflare.settings import Federation, SettingsError
from flap_nvflare.site.limits import Limits
from flap_nvflare.site.reasons import SiteError

SITES = ("A", "B")
CLASSES = ["left kidney (whole)", "tumour+cyst"]


class Server:
    """A server whose run is opened, gone on with and tracked; without FLARE's processes."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        patch.setenv("FLAP_HOME", str(folder))
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds to make
        patch.setenv("MLFLOW_TRACKING_URI", self.uri)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        for name in ("FLAP_SAM_CHECKPOINT", "MLFLOW_DISABLE_TELEMETRY"):
            patch.delenv(name, raising=False)

    @property
    def uri(self) -> str:
        return (self.folder / "mlruns").as_uri()

    @property
    def context(self) -> FLContext:
        workspace = SimpleNamespace(get_run_dir=lambda job: str(self.folder / "work"))
        engine = SimpleNamespace(get_workspace=lambda: workspace)
        context = FLContext()
        context.put(ReservedKey.ENGINE, engine, private=True, sticky=False)
        context.put(ReservedKey.RUN_NUM, "0123456789", private=False, sticky=False)
        return context

    def open(self, word: str, resume: bool = False, **changes: Any) -> ServerJob:
        self.patch.setenv("FLAP_RESUME", "last" if resume else "")
        changes = {"class_names": CLASSES, **changes, "tracking": word}
        settings = {**SETTINGS.to_dict(), **changes}
        job = open_job(self.context, "fed_kits", settings, SITES)
        if not resume:
            job.write_description()
        return job

    def track(self, job: ServerJob) -> Tracking:
        found = start_tracking(job, self.context)
        assert found is not None
        return found

    def shown(self, job: ServerJob) -> Curves:
        if job.federation.tracking == "mlflow":
            return in_mlflow(self.uri)
        return in_tensorboard(job.folder.path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def finish_round(job: ServerJob, index: int) -> None:
    """A round of which A told all, and B's update was refused in every second."""
    job.begin_round(index)
    for number, site in enumerate(SITES):
        job.ledger.add(index, site, "down", 200 + index)
        job.ledger.add(index, site, "up", 20_000_001 + number + index)
        share = 0.1 * (index + 1)
        known = {CLASSES[0]: share, CLASSES[1]: share if index > 1 else None, "mean": share}
        dice = known if index else {}  # nothing is scored before the first round
        report = {
            "steps": 3,
            "loss": 1 / (index + 2),
            "seconds": 1.5,
            "dice": dice if index else {},
        }
        if number and index % 2:
            job.refuse(Refusal(site, index, "some.tensor", "not finite"))
        else:
            job.reports[site] = report
    save_round(job, index)


@pytest.mark.parametrize("word", ["tensorboard", "mlflow"])
def test_a_run_that_goes_on_shows_every_round_once(server: Server, word: str) -> None:
    job = server.open(word)
    one = server.track(job)
    for index in range(2):
        finish_round(job, index)
        one.hand_on()
    one.close()  # the job was aborted
    before = server.shown(job)
    assert before == in_lines(job.folder.rounds())
    assert {name for _, name in before if name.startswith("validation_dice/")}
    # A kill between the line of a round and its adapter: the round is done again.
    job.begin_round(2)
    job.folder.append_round(job.round_line(2))
    job.folder.release()

    again = server.open(word, resume=True)
    assert again.start_round == 2
    other = server.track(again)
    for index in (2, 3):
        finish_round(again, index)
        other.hand_on()
    other.close()
    shown = server.shown(again)
    assert shown == in_lines(again.folder.rounds())
    assert [step for step, _ in shown[ALL_SITES, "refused"]] == [0, 1, 2, 3]
    again.folder.release()


def test_mlflow_has_a_run_for_each_site_and_one_for_all(server: Server) -> None:
    job = server.open("mlflow", rounds=2)
    one = server.track(job)
    finish_round(job, 0)
    one.hand_on()
    one.close()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    _, runs = mlflow_runs(server.uri)
    assert {run.info.status for run in runs} == {"FAILED"}
    job.folder.release()

    job = server.open("mlflow", resume=True, rounds=2)
    one = server.track(job)
    _, runs = mlflow_runs(server.uri)
    assert {run.info.status for run in runs} == {"RUNNING"}
    finish_round(job, 1)
    one.hand_on()
    one.close()
    _, runs = mlflow_runs(server.uri)
    assert sorted(run.data.tags["site"] for run in runs) == ["A", "B", ALL_SITES]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["run"] for run in runs} == {job.run}
    (everyone,) = (run for run in runs if run.data.tags["site"] == ALL_SITES)
    assert everyone.data.params["rank"] == str(job.federation.rank)
    assert everyone.data.params["base_sha256"] == job.spec.base_sha256
    # Signs that MLflow takes in no name have become their codes.
    assert "validation_dice/left kidney :28whole:29" in everyone.data.metrics
    job.folder.release()


def test_a_run_that_goes_on_with_another_tracking_server_is_shown_there_whole(
    server: Server,
) -> None:
    job = server.open("mlflow")
    one = server.track(job)
    finish_round(job, 0)
    one.hand_on()
    one.close()
    job.folder.release()

    elsewhere = (server.folder / "elsewhere").as_uri()
    server.patch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    job = server.open("mlflow", resume=True)
    one = server.track(job)
    finish_round(job, 1)
    one.hand_on()
    one.close()
    assert in_mlflow(elsewhere) == in_lines(job.folder.rounds())
    assert [step for step, _ in in_mlflow(server.uri)[ALL_SITES, "seconds"]] == [0]
    job.folder.release()


@pytest.mark.parametrize("word", ["tensorboard", "mlflow"])
def test_a_missing_package_stops_the_job_before_it_has_a_folder(server: Server, word: str) -> None:
    module, _ = importlib.import_module("flap_nvflare.flare.trackers")._RECEIVERS[word]
    server.patch.setitem(sys.modules, module, None)
    with pytest.raises(SettingsError, match=rf"tracking: {word} needs .*flap_nvflare\[tracking\]"):
        server.open(word)
    assert not (server.folder / "runs").exists()
    job = server.open("none")
    assert start_tracking(job, server.context) is None
    job.folder.release()


def test_a_tracking_server_that_does_not_answer_stops_the_job_at_its_start(server: Server) -> None:
    server.patch.setenv("MLFLOW_TRACKING_URI", "http://somebody:se@cret@127.0.0.1:9")
    job = server.open("mlflow")
    with pytest.raises(SettingsError, match=r"mlflow can't be started: .*refused") as told:
        server.track(job)
    assert "cret" not in str(told.value)
    job.folder.release()


class Shaky:
    """A tracker that fails, or waits, until it is told otherwise."""

    place = "nowhere"

    def __init__(self) -> None:
        self.works, self.failed, self.goes_on = False, threading.Event(), threading.Event()
        self.goes_on.set()
        self.saved: list[tuple[str, int]] = []
        self.tries = self.closed = 0

    def open(self, origin: str) -> int:
        return 0

    def save(self, origin: str, step: int, figures: Mapping[str, float]) -> None:
        self.tries += 1
        self.goes_on.wait(60)
        if not self.works:
            self.failed.set()
            raise ConnectionError("nobody answers")
        self.saved.append((origin, step))

    def close(self, whole: bool) -> None:
        self.closed += 1


def test_rounds_that_a_tracker_did_not_take_come_with_the_next(server: Server) -> None:
    shaky = Shaky()
    server.patch.setattr(tracking, "make_tracker", lambda job, fl_ctx: shaky)
    job = server.open("tensorboard")
    one = server.track(job)
    finish_round(job, 0)
    one.hand_on()
    assert shaky.failed.wait(60)
    assert shaky.tries == 1
    shaky.works = True
    finish_round(job, 1)
    one.hand_on()
    one.close()
    assert shaky.saved == [(site, step) for step in (0, 1) for site in ("A", "B", ALL_SITES)]
    assert shaky.closed == 1
    job.folder.release()


def test_no_round_waits_for_a_tracker(server: Server) -> None:
    shaky = Shaky()
    shaky.works = True
    shaky.goes_on.clear()
    server.patch.setattr(tracking, "make_tracker", lambda job, fl_ctx: shaky)
    server.patch.setattr(tracking, "_LAST_WAIT", 0.1)
    job = server.open("tensorboard")
    one = server.track(job)
    finish_round(job, 0)
    one.hand_on()
    one.close()  # the job's end does not wait for ever, either
    assert not shaky.saved
    shaky.goes_on.set()
    one._thread.join(60)
    assert len(shaky.saved) == 3
    job.folder.release()


def test_a_site_can_refuse_jobs_that_are_tracked() -> None:
    Limits().check(Federation(tracking="mlflow"))
    with pytest.raises(SiteError, match="tracking"):
        Limits(choices={"tracking": ("none",)}).check(Federation(tracking="mlflow"))


def test_the_recipe_takes_the_same_word(tmp_path: Path) -> None:
    FlapRecipe(tracking="mlflow").export(job_dir=str(tmp_path))
    (server,) = tmp_path.rglob("config_fed_server.json")
    (workflow,) = json.loads(server.read_text())["workflows"]
    assert Federation.from_dict(workflow["args"]["federation"]).tracking == "mlflow"


def test_a_job_without_tracking_imports_no_tracker() -> None:
    code = (
        "import sys, flap_nvflare.flare.controller\n"
        "from flap_nvflare.flare.trackers import receiver_class\n"
        "assert receiver_class('none') is None\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlflow', 'tensorboard', 'alembic')"
        " or m.startswith('nvflare.app_opt.tracking')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
