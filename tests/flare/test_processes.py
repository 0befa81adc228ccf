"""A round handed to two processes of the site, by the executor as FLARE calls it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch
from contexts import SiteContext
from nvflare.apis.dxo import DataKind
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from processes import descendants
from safetensors.torch import load_file
from scan_files import write_sites
from test_executor import train_task

from flap_nvflare.flare import messages
from flap_nvflare.flare.executor import FlapExecutor

pytestmark = pytest.mark.slow  # each process of a round imports for seconds

STATE = "home/state/fed_kits/20260101-000000/A"


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteContext:
    monkeypatch.setenv("FLAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("FLAP_DATA_ROOT", "FLAP_SAM_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    context = SiteContext(tmp_path)
    write_sites(tmp_path / "scans", ("A",))
    (context.local / "flap_site.yaml").write_text(
        f"data_root: {tmp_path / 'scans'}\ndevice: cpu\nprocesses: 2\n"
        "limits:\n  ranges:\n    local_epochs: [1, 500]\n",
        encoding="utf-8",
    )
    return context


def trained(reply: Shareable) -> dict[str, torch.Tensor]:
    assert reply.get_return_code() == ReturnCode.OK
    tensors: dict[str, torch.Tensor] = messages.read_dxo(reply, DataKind.WEIGHTS).data
    return tensors


def words(pid: int, name: str) -> list[bytes]:
    """A process's `cmdline` or `environ`; nothing once it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")
    except OSError:
        return []


def children() -> list[int]:
    """torchrun and its processes, started by this test and still there."""
    modules = {b"flap_nvflare.bundle.torchrun", b"flap_nvflare.bundle.parallel"}
    return [pid for pid in descendants(os.getpid()) if modules & set(words(pid, "cmdline"))]


def rank_process(rank: int) -> int | None:
    """The id of this test's process of that rank, once it is there."""
    wanted = f"RANK={rank}".encode()
    return next((pid for pid in children() if wanted in words(pid, "environ")), None)


def at_first_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Calls `act` once, when the executor hears of the round's first steps."""

    def tell(self: FlapExecutor, workflow: Any, fl_ctx: Any) -> Any:
        def told(figures: dict[str, Any]) -> None:
            if not acted:
                acted.append(figures["step"])
                act()

        return told

    acted: list[int] = []
    monkeypatch.setattr(FlapExecutor, "_progress", tell)


def test_two_processes_give_a_reply_as_one_does(context: SiteContext, tmp_path: Path) -> None:
    settings = {"dice_weight": 0.0, "batch_size": 3}
    reply = FlapExecutor().execute(messages.TRAIN, train_task(**settings), context, Signal())
    two = trained(reply)
    site = context.local / "flap_site.yaml"
    site.write_text(site.read_text().replace("processes: 2", "processes: 1"), encoding="utf-8")
    moments = load_file(tmp_path / STATE / "moments_0.safetensors")
    alone = FlapExecutor().execute(messages.TRAIN, train_task(**settings), context, Signal())
    one = trained(alone)
    assert list(two) == list(one)
    assert all(torch.allclose(two[name], one[name], rtol=0, atol=1e-4) for name in one)
    for name, tensor in load_file(tmp_path / STATE / "moments_0.safetensors").items():
        assert torch.allclose(moments[name], tensor, rtol=1e-2, atol=1e-4), name
    reports = [
        messages.read_dxo(answer, DataKind.WEIGHTS).meta[messages.REPORT]
        for answer in (reply, alone)
    ]
    for name in ("steps", "slices", "cases", "synthetic", "dice"):
        assert reports[0][name] == reports[1][name]
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-4)
    assert sorted(path.name for path in (tmp_path / STATE).iterdir()) == [
        "adapter.safetensors",
        "moments_0.safetensors",
    ]
    assert not children()


def test_a_killed_process_fails_the_round_and_the_next_one_works(
    context: SiteContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def kill() -> None:
        pid = rank_process(1)
        assert pid is not None
        os.kill(pid, SIGKILL)

    executor = FlapExecutor()
    at_first_step(monkeypatch, kill)
    with caplog.at_level(logging.WARNING):
        reply = executor.execute(messages.TRAIN, train_task(local_epochs=500), context, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "site A, round 0: rank 1 of 2 processes failed: killed by SIGKILL" in caplog.text
    assert not children()
    state = tmp_path / STATE
    assert [path.name for path in state.iterdir()] == ["failed_round"]

    assert trained(executor.execute(messages.TRAIN, train_task(), context, Signal()))
    assert (state / "moments_0.safetensors").is_file()


def test_an_abort_ends_all_processes_within_seconds(
    context: SiteContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal, at = Signal(), []

    def abort() -> None:
        at.append(time.monotonic())
        assert rank_process(0)
        assert rank_process(1)
        signal.trigger(True)

    at_first_step(monkeypatch, abort)
    reply = FlapExecutor().execute(messages.TRAIN, train_task(local_epochs=500), context, signal)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED
    assert time.monotonic() - at[0] < 8
    assert not children()
    assert not list((tmp_path / STATE).iterdir())


def test_an_abort_while_the_processes_start_ends_them(context: SiteContext, tmp_path: Path) -> None:
    signal = Signal()
    timer = threading.Timer(3.0, signal.trigger, (True,))
    timer.start()
    started = time.monotonic()
    reply = FlapExecutor().execute(messages.TRAIN, train_task(local_epochs=500), context, signal)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED
    assert time.monotonic() - started < 12
    assert not children()


def test_an_error_of_the_processes_is_the_rounds(
    context: SiteContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "scans" / "case_00000" / "segmentation.nii.gz").write_bytes(bytes(8))
    (tmp_path / "scans" / "case_00001" / "segmentation.nii.gz").write_bytes(bytes(8))
    with caplog.at_level(logging.WARNING):
        reply = FlapExecutor().execute(messages.TRAIN, train_task(), context, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "of 2 processes failed: DataError: " in caplog.text
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors
    assert not any("case_" in text for text in errors)


def test_no_process_outlives_the_one_that_asked(context: SiteContext, tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "import pathlib, sys\n"
        "from flap_nvflare.bundle.workflow import build_work\n"
        "from flap_nvflare.flare.processes import train_in_processes\n"
        "from flap_nvflare.settings import Federation, Site\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "site = Site('A', folder / 'scans', device='cpu', processes=2)\n"
        "settings = Federation(base='random', image_size=32, rank=2, local_epochs=500)\n"
        "train_in_processes(build_work(settings, site), 0, folder, lambda: False, print)\n",
        encoding="utf-8",
    )
    asking = subprocess.Popen(
        [sys.executable, "-u", str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert asking.stdout is not None
    with asking:
        assert "'step': 1" in asking.stdout.readline()
        started = [pid for pid in descendants(asking.pid) if pid != asking.pid]
        assert len(started) >= 3
        asking.kill()
    deadline = time.monotonic() + 15
    while any(any(words(pid, "cmdline")) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in started if any(words(pid, "cmdline"))]
