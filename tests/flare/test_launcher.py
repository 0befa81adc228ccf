"""The launcher of a site's job process, with shell commands in place of FLARE's process."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from signal import SIGKILL, SIGSEGV
from types import SimpleNamespace

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, JobConstants, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs, JobReturnCode
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle
from nvflare.utils.process_utils import ProcessAdapter, spawn_process

from flap_nvflare.flare.launcher import RestartedProcess, RestartingLauncher
from flap_nvflare.flare.running_jobs import (
    CREDENTIALS,
    FILE,
    RunningJob,
    RunningJobs,
    end_left_over,
)

SHELL = "/bin/sh"


class Launches:
    """Starts one shell command after the other, the last of them for ever."""

    def __init__(self, commands: Sequence[str]) -> None:
        self.commands, self.started = list(commands), []

    def __call__(self) -> ProcessHandle:
        command = self.commands[min(len(self.started), len(self.commands) - 1)]
        adapter: ProcessAdapter = spawn_process([SHELL, "-c", command], dict(os.environ))
        self.started.append(adapter.pid)
        return ProcessHandle(process_adapter=adapter)


def process(
    launches: Launches, restarts: int = 3, wait: float = 0.0, said: bool = False
) -> RestartedProcess:
    return RestartedProcess(launches, lambda: said, restarts, wait, lambda text: None)


def test_a_killed_process_is_started_again_until_it_ends_by_itself() -> None:
    launches = Launches([f"kill -{int(SIGKILL)} $$", f"kill -{int(SIGSEGV)} $$", "exit 0"])
    one = process(launches)
    assert one.poll() == JobReturnCode.UNKNOWN
    one.wait()
    assert len(launches.started) == 3
    assert one.poll() == JobReturnCode.SUCCESS


@pytest.mark.parametrize("code", [0, 1, 9, 101, 102, 103, 104])
def test_a_process_that_says_how_the_job_ended_is_believed(code: int) -> None:
    launches = Launches([f"exit {code}"])
    one = process(launches)
    one.wait()
    assert len(launches.started) == 1
    plain = ProcessHandle(process_adapter=spawn_process([SHELL, "-c", f"exit {code}"], {}))
    plain.wait()
    assert one.poll() == plain.poll()


def test_after_its_restarts_a_process_is_missed_and_no_failure() -> None:
    launches = Launches(["exit 137"])
    told: list[str] = []
    one = RestartedProcess(launches, lambda: False, 2, 0.0, told.append)
    one.wait()
    assert len(launches.started) == 3
    assert one.poll() == JobReturnCode.UNKNOWN
    assert len(told) == 3
    assert "exit code 137" in told[0]


def test_a_process_that_wrote_its_outcome_is_not_started_again() -> None:
    launches = Launches([f"kill -{int(SIGKILL)} $$"])
    one = process(launches, said=True)
    one.wait()
    assert len(launches.started) == 1


def test_the_waits_grow() -> None:
    launches = Launches(["exit 5", "exit 5", "exit 0"])
    started = time.monotonic()
    process(launches, wait=0.2).wait()
    assert 0.6 <= time.monotonic() - started < 5


@pytest.mark.parametrize("when", ["while it runs", "while it waits"])
def test_what_is_ended_is_not_started_again(when: str) -> None:
    launches = Launches(["sleep 60"] if when == "while it runs" else ["exit 5", "sleep 60"])
    one = process(launches, wait=30.0)
    waiting = threading.Thread(target=one.wait)
    waiting.start()
    time.sleep(0.3)
    one.terminate()
    waiting.join(5)
    assert not waiting.is_alive()
    assert len(launches.started) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(launches.started[0], 0)


def test_a_launch_that_fails_ends_the_wait() -> None:
    class Broken(Launches):
        def __call__(self) -> ProcessHandle:
            if self.started:
                raise OSError("no such file")
            return super().__call__()

    one = process(Broken(["exit 5"]))
    one.wait()
    assert one.poll() == JobReturnCode.UNKNOWN


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FLContext:
    """A site's context; the command of each job is the script `job.py` with the job's token."""
    monkeypatch.setenv("SEEN", "here")
    context = FLContext()
    workspace = SimpleNamespace(
        get_root_dir=lambda: str(tmp_path),
        get_app_custom_dir=lambda job: "",
        get_job_meta_path=lambda job: str(tmp_path / job / "meta.json"),
    )
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace)
    log_in(context, "first")

    def command(self: RestartingLauncher, job_meta: dict[str, str], fl_ctx: FLContext) -> str:
        token = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS)[JobProcessArgs.AUTH_TOKEN][1]
        job = job_meta[JobConstants.JOB_ID]
        return shlex.join([sys.executable, str(tmp_path / "job.py"), token, job])

    monkeypatch.setattr(RestartingLauncher, "get_command", command)
    return context


def log_in(context: FLContext, token: str) -> None:
    """What FLARE's client gives every job process after its login."""
    arguments = {name: (f"-{name}", f"{token} {name}") for name in CREDENTIALS}
    arguments[JobProcessArgs.AUTH_TOKEN] = ("-t", token)
    context.set_prop(FLContextKey.JOB_PROCESS_ARGS, arguments, private=True, sticky=False)


def script(folder: Path, *lines: str) -> Path:
    """The job's process: writes its token into a file, then does the lines."""
    told = folder / "told.txt"
    start = (
        "import os, pathlib, sys, time",
        f"told = pathlib.Path({str(told)!r})",
        "with told.open('a') as file:",
        "    file.write(f\"{os.environ['SEEN']}-{sys.argv[1]}\\n\")",
    )
    (folder / "job.py").write_text("\n".join([*start, *lines]), encoding="utf-8")
    return told


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)


def test_flare_gets_one_handle_for_all_processes_of_a_job(site: FLContext, tmp_path: Path) -> None:
    again = "if len(told.read_text().split()) < 3: os.kill(os.getpid(), 9)"
    told = script(tmp_path, again)
    launcher = RestartingLauncher(restarts=2, wait=0)
    launcher.handle_event(EventType.BEFORE_JOB_LAUNCH, site)
    (registered,) = site.get_prop(FLContextKey.JOB_LAUNCHER)
    handle = registered.launch_job({JobConstants.JOB_ID: "one"}, site)
    handle.wait()
    assert handle.poll() == JobReturnCode.SUCCESS
    assert told.read_text().split() == ["here-first"] * 3
    assert not list(tmp_path.rglob(FILE))

    (tmp_path / "two").mkdir()
    (tmp_path / "two" / FLMetaKey.PROCESS_RC_FILE).write_text("101")
    told.unlink()
    registered.launch_job({JobConstants.JOB_ID: "two"}, site).wait()
    assert len(told.read_text().split()) == 1


def test_a_site_that_was_cut_off_goes_on_by_its_login_of_before(
    site: FLContext, tmp_path: Path
) -> None:
    told = script(tmp_path, "time.sleep(60 if len(told.read_text().split()) < 2 else 0)")
    job = {JobConstants.JOB_ID: "one"}
    handle = RestartingLauncher(wait=0).launch_job(job, site)  # and this site's parent is killed
    wait_for(told)
    (note,) = tmp_path.rglob(FILE)
    assert note.stat().st_mode & 0o777 == 0o600
    assert [one.returns for one in RunningJobs(tmp_path).left()] == [0]
    (tmp_path / "one" / "meta.json").write_text(json.dumps(job))

    after, started = RestartingLauncher(wait=0), []

    def start_app(job_id: str, meta: dict[str, str]) -> str:
        assert meta == job
        log_in(site, "second")
        started.append(after.launch_job(meta, site))
        return "started"

    site.set_prop(ReservedKey.ENGINE, SimpleNamespace(start_app=start_app), private=True)
    after.handle_event(EventType.SYSTEM_START, site)
    assert [one.returns for one in RunningJobs(tmp_path).left()] == [1]
    started[0].wait()
    assert started[0].poll() == JobReturnCode.SUCCESS
    assert told.read_text().split() == ["here-first"] * 2
    assert not list(tmp_path.rglob(FILE))
    # The first was ended before the second was started.
    assert handle._process.adapter.poll() == -SIGKILL


def test_a_job_that_ends_its_site_is_left_after_its_restarts(
    site: FLContext, tmp_path: Path
) -> None:
    jobs = RunningJobs(tmp_path)
    jobs.note(RunningJob("one", 2**22 + 1, 3, dict.fromkeys(CREDENTIALS, "x")))
    credentials = dict.fromkeys(CREDENTIALS, "x")
    changes = ({"pid": -1}, {"job": "one"}, {"credentials": {}}, {"returns": "0"}, {"more": 1})
    for index, change in enumerate(changes):
        name = f"job{index}"
        values = {"job": name, "pid": 7, "returns": 0, "credentials": credentials, **change}
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text(json.dumps(values))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / FILE).write_text("{")
    assert [one.job for one in jobs.left()] == ["one"]
    RestartingLauncher(restarts=3).handle_event(EventType.SYSTEM_START, site)  # starts nothing
    assert not jobs.left()


def test_a_note_of_another_process_ends_none(tmp_path: Path) -> None:
    other: ProcessAdapter = spawn_process([SHELL, "-c", "sleep 20"], {})
    end_left_over(RunningJob("one", other.pid, 0, {}))
    assert other.poll() is None
    other.terminate()
    other.wait()


@pytest.mark.parametrize("values", [{"restarts": -1}, {"wait": -0.5}])
def test_numbers_below_zero_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give numbers from 0"):
        RestartingLauncher(**values)
