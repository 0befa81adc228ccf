"""A round trained by several processes of this site: started, watched, and ended with the task.

FLARE's own way to start a process in a session of its own, `spawn_process`, starts torchrun
(`bundle.torchrun`), and torchrun the processes (`bundle.parallel`). How many is the site's
setting `processes`; no job has a say in it.
"""

from __future__ import annotations

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
from flap_nvflare.bundle.round_files import RoundFolder
from flap_nvflare.bundle.torchrun import LAUNCHER_OUTPUT
from flap_nvflare.training.errors import StateError, Stopped, TrainingError

if TYPE_CHECKING:
    from flap_nvflare.training.work import SiteWork, TrainReport

_PREFIX = "round_"
_FAILED = "failed_round"  # what the processes of the last failed round left, for the site's IT
_POLL = 0.2
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
        TrainingError: if a process fails or is killed; the same holds.
    """
    for left in state.glob(f"{_PREFIX}*"):  # of a killed process of this site
        shutil.rmtree(left, ignore_errors=True)
    folder = RoundFolder(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=state)))
    where = f"site {work.site.name}, round {round_index}"
    with folder.lock():
        folder.ask(work, round_index)
        _release_gpu_memory(work)
        torchrun = spawn_process(
            [sys.executable, "-m", "flap_nvflare.bundle.torchrun", str(folder.path)],
            _environment(),
        )
        try:
            while torchrun.poll() is None:
                if should_stop():
                    raise Stopped(f"{where}: stopped as asked")
                _tell(folder, progress)
                time.sleep(_POLL)
            _tell(folder, progress)
            if torchrun.poll() != 0:
                raise TrainingError(_complaint(folder, where, work.site.processes, torchrun.poll()))
            return _result(folder, work, where)
        except TrainingError:
            shutil.rmtree(state / _FAILED, ignore_errors=True)
            shutil.copytree(folder.path, state / _FAILED)
            raise
        finally:
            _end(torchrun)
            shutil.rmtree(folder.path, ignore_errors=True)


def _result(folder: RoundFolder, work: SiteWork, where: str) -> TrainReport:
    try:
        return folder.take(work)
    except (OSError, UpdateError, StateError, ValueError) as error:
        raise TrainingError(f"{where}: the processes left no whole result: {error}") from error


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


def _complaint(folder: RoundFolder, where: str, count: int, code: int | None) -> str:
    kept = f"their output lies in {folder.path.parent / _FAILED}"
    failure = folder.settled()
    if failure is not None:
        return f"{where}: rank {failure.rank} of {count} processes failed: {failure.what}; {kept}"
    log = folder.path / LAUNCHER_OUTPUT
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"{where}: torchrun for {count} processes ended with code {code}: {last}; {kept}"


def _end(torchrun: ProcessAdapter) -> None:
    """Ends torchrun and with it all processes, if they have not ended."""
    if torchrun.poll() is not None:
        return
    # By this signal it ends its processes, which are in sessions of their own, one and all.
    os.kill(torchrun.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while torchrun.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL / 4)
    if torchrun.poll() is None:
        torchrun.terminate()
        torchrun.wait()
