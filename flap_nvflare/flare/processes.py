"""A round trained by other processes of this site: started, watched, and ended with the task.

FLARE's own way to start a process in a session of its own, `spawn_process`, starts one process
(`bundle.own_process`), or torchrun (`bundle.torchrun`) and by it several (`bundle.parallel`).
Both are the site's settings, `own_process` and `processes`; no job has a say in them. Whatever
ends a process is a `SiteError` here, and the site goes on with the next task.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvflare.utils.process_utils import ProcessAdapter, spawn_process

import flap_nvflare
from flap_nvflare.adapter.update import UpdateError
from flap_nvflare.bundle.own_process import OWN_OUTPUT
from flap_nvflare.bundle.round_files import Failure, RoundFolder
from flap_nvflare.bundle.torchrun import LAUNCHER_OUTPUT, ended_by
from flap_nvflare.site.reasons import SiteError, of_kinds
from flap_nvflare.training.errors import StateError, Stopped

if TYPE_CHECKING:
    from flap_nvflare.training.work import SiteWork, TrainReport

_PREFIX = "round_"
_FAILED = "failed_round"  # what the processes of the last failed round left, for the site's IT
_POLL = 0.1
# torchrun gives a process 30 s to go before it kills it.
_GRACE = 40.0


def train_in_processes(
    work: SiteWork,
    round_index: int,
    state: Path,
    should_stop: Callable[[], bool],
    progress: Callable[[dict[str, Any]], None],
) -> TrainReport:
    """Trains a round as `SiteWork.train` does, with the site's number of processes.

    Args:
        work: where the round starts from; holds its result afterwards.
        round_index: the round, from 0.
        state: the site's state folder of this run; the round has a folder in it while it lasts.
        should_stop: asked several times a second.
        progress: told {round, step, steps, loss, rate} after every step.

    Raises:
        Stopped: if asked to; `work` is as it was.
        SiteError: if a process fails or is killed, or the round takes longer than the
            federation's `train_timeout`, after which nobody waits for it; the same holds.
    """
    for left in state.glob(f"{_PREFIX}*"):  # of a killed process of this site
        shutil.rmtree(left, ignore_errors=True)
    folder = RoundFolder(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=state)))
    where = f"site {work.site.name}, round {round_index}"
    try:
        with folder.lock():
            folder.ask(work, round_index)
            _release_gpu_memory(work)
            process = _start(folder, work.site.processes)
            try:
                _watch(process, folder, work, where, should_stop, progress)
            finally:
                _end(process)
            return _result(folder, work, where)
    except SiteError:
        shutil.rmtree(state / _FAILED, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.path.rename(state / _FAILED)
        raise
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def _start(folder: RoundFolder, count: int) -> ProcessAdapter:
    module = "own_process" if count == 1 else "torchrun"
    command = [sys.executable, "-m", f"flap_nvflare.bundle.{module}", str(folder.path)]
    return spawn_process(command, _environment())


def _watch(
    process: ProcessAdapter,
    folder: RoundFolder,
    work: SiteWork,
    where: str,
    should_stop: Callable[[], bool],
    progress: Callable[[dict[str, Any]], None],
) -> None:
    """Returns when the processes have ended well."""
    seconds = work.federation.train_timeout
    end = time.monotonic() + seconds
    while (code := process.poll()) is None:
        if should_stop():
            raise Stopped(f"{where}: stopped as asked")
        if time.monotonic() > end:
            raise SiteError(
                "trainer_timeout", f"{where}: not done after train_timeout", seconds=seconds
            )
        _tell(folder, progress)
        time.sleep(_POLL)
    _tell(folder, progress)
    if code != 0:
        raise _failure(folder, where, work.site.processes, code)


def _result(folder: RoundFolder, work: SiteWork, where: str) -> TrainReport:
    try:
        return folder.take(work)
    except (OSError, UpdateError, StateError, ValueError) as error:
        text = f"{where}: the processes left no whole result: {error}"
        raise SiteError("trainer_killed", text, exit_code=0) from error


def _environment() -> dict[str, str]:
    """This process's own, in which `-m` finds the package that runs here."""
    package = str(Path(flap_nvflare.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _release_gpu_memory(work: SiteWork) -> None:
    """The first process shares a GPU with this one, which only holds what scoring left cached."""
    if work.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _tell(folder: RoundFolder, progress: Callable[[dict[str, Any]], None]) -> None:
    for figures in folder.progress():
        progress(figures)


def _failure(folder: RoundFolder, where: str, count: int, code: int) -> SiteError:
    """The error of the process that failed first: its own reason, else that it is gone."""
    kept = f"what it left lies in {folder.path.parent / _FAILED}"
    failure = folder.settled() if count > 1 else next(iter(folder.failures()), None)
    if failure is None:
        log = folder.path / (LAUNCHER_OUTPUT if count > 1 else OWN_OUTPUT)
        failure = Failure(0, f"{ended_by(code)}: {_last_line(log)}", 0.0, exit_code=code)
    text = f"{where}: rank {failure.rank} of {count} processes failed: {failure.what}; {kept}"
    if failure.kinds:
        return of_kinds(failure.kinds, text)
    return SiteError("trainer_killed", text, exit_code=failure.exit_code)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _end(process: ProcessAdapter) -> None:
    """Ends the processes, if they have not ended, and what they have started."""
    if process.poll() is None:
        # By this signal torchrun ends its processes, which are in sessions of their own.
        os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL / 4)
        if process.poll() is None:
            process.terminate()
            process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # workers that read scans
        os.killpg(process.pid, signal.SIGKILL)
