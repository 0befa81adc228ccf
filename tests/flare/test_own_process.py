"""A round in a process of its own: the same bytes, and no fault of it is the site's end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
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

STATE = "home/state/fed_kits/20260101-000000/A"
# The first lines of a process, run by Python itself: what building the work does there.
FAULTS = {
    "killed": "os.kill(os.getpid(), 9)",
    "left": "os._exit(3)",
    "memory": "raise MemoryError",
    "cuda": "raise torch.OutOfMemoryError('CUDA out of memory')",
    "disk": "raise OSError(errno.ENOSPC, 'No space left on device', '/data/case_00017')",
    "scan": "raise DataError('/data/case_00017: damaged')",
    "hangs": "time.sleep(600)",
}


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteContext:
    monkeypatch.setenv("FLAP_HOME", str(tmp_path / "home"))
    for name in ("FLAP_DATA_ROOT", "FLAP_SAM_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    context = SiteContext(tmp_path)
    write_sites(tmp_path / "scans", ("A",))
    own_process(context, "auto")
    return context


def own_process(context: SiteContext, switch: str) -> None:
    text = (
        f"data_root: {context.local.parent / 'scans'}\ndevice: cpu\nown_process: {switch}\n"
        "limits:\n  ranges:\n    local_epochs: [1, 300]\n"
    )
    (context.local / "flap_site.yaml").write_text(text, encoding="utf-8")


def fault(monkeypatch: pytest.MonkeyPatch, folder: Path, what: str) -> None:
    """Lets every further Python process fail where it would build the site's work."""
    folder = folder / "first"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import errno, os, time\n"
        "def build_work(*arguments):\n"
        "    import torch\n"
        "    from flap_nvflare.data.errors import DataError\n"
        f"    {what}\n"
        "import flap_nvflare.bundle.workflow as workflow\n"
        "workflow.build_work = build_work\n",
        encoding="utf-8",
    )
    package = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{package}")


def execute(executor: FlapExecutor, context: SiteContext, **settings: Any) -> Shareable:
    return executor.execute(messages.TRAIN, train_task(**settings), context, Signal())


def trained(reply: Shareable) -> dict[str, torch.Tensor]:
    assert reply.get_return_code() == ReturnCode.OK
    tensors: dict[str, torch.Tensor] = messages.read_dxo(reply, DataKind.WEIGHTS).data
    return tensors


def own_processes() -> list[int]:
    """The processes of rounds that this test has started and that are still there."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"flap_nvflare.bundle.own_process" in words:
            found.append(pid)
    return found


def test_a_process_of_its_own_gives_the_same_bytes(context: SiteContext, tmp_path: Path) -> None:
    own = execute(FlapExecutor(), context)
    moments = load_file(tmp_path / STATE / "moments_0.safetensors")
    own_process(context, "off")
    here = execute(FlapExecutor(), context)
    one, other = trained(own), trained(here)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = load_file(tmp_path / STATE / "moments_0.safetensors")
    assert moments.keys() == again.keys()
    assert all(torch.equal(moments[name], again[name]) for name in again)
    reports = [messages.read_dxo(r, DataKind.WEIGHTS).meta[messages.REPORT] for r in (own, here)]
    for name in ("loss", "steps", "slices", "cases"):
        assert reports[0][name] == reports[1][name]
    left = sorted(path.name for path in (tmp_path / STATE).iterdir())
    assert left == ["adapter.safetensors", "moments_0.safetensors"]


def test_the_simulator_trains_where_it_is_asked(
    tmp_path: Path, context: SiteContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch, tmp_path, FAULTS["left"])
    simulator = SiteContext(tmp_path, simulated=True)
    assert trained(execute(FlapExecutor(), simulator))


@pytest.mark.parametrize(
    ("what", "reason", "numbers"),
    [
        ("killed", "trainer_killed", {"exit_code": -9}),
        pytest.param("left", "trainer_killed", {"exit_code": 3}, marks=pytest.mark.long),
        ("memory", "out_of_memory", {}),
        pytest.param("cuda", "out_of_memory", {}, marks=pytest.mark.long),
        ("disk", "disk_full", {}),
        pytest.param("scan", "data_missing", {}, marks=pytest.mark.long),
        ("hangs", "trainer_timeout", {"seconds": 4}),
    ],
)
def test_a_fault_of_the_process_is_a_reply_with_its_reason(
    context: SiteContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str,
    reason: str, numbers: dict[str, int], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fault(monkeypatch, tmp_path, FAULTS[what])
    seconds = 4 if what == "hangs" else 300
    with caplog.at_level(logging.WARNING):
        reply = execute(FlapExecutor(), context, train_timeout=seconds)
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "DXO" not in reply
    assert reply.get_header(messages.REASON) == {"code": reason, "numbers": numbers}
    assert [path.name for path in (tmp_path / STATE).iterdir()] == ["failed_round"]
    assert not own_processes()
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "case_" not in errors[0]


def test_an_abort_ends_the_process(
    context: SiteContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch, tmp_path, FAULTS["hangs"])
    signal = Signal()
    threading.Timer(2.0, signal.trigger, (True,)).start()
    started = time.monotonic()
    reply = FlapExecutor().execute(messages.TRAIN, train_task(), context, signal)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED
    assert time.monotonic() - started < 8
    assert not own_processes()
    assert not list((tmp_path / STATE).iterdir())


@pytest.mark.slow
def test_after_a_kill_in_the_middle_the_round_can_be_done_again_to_the_same_bytes(
    context: SiteContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(self: FlapExecutor, workflow: Any, fl_ctx: Any) -> Any:
        def told(figures: dict[str, Any]) -> None:
            for pid in own_processes():
                os.kill(pid, SIGKILL)

        return told

    executor = FlapExecutor()
    with monkeypatch.context() as patch:
        patch.setattr(FlapExecutor, "_progress", tell)
        reply = execute(executor, context, local_epochs=300)
    assert reply.get_header(messages.REASON) == {
        "code": "trainer_killed",
        "numbers": {"exit_code": -9},
    }
    again = trained(execute(executor, context))
    fresh = trained(execute(FlapExecutor(), context))
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


@pytest.mark.slow
def test_the_process_does_not_outlive_the_one_that_asked(tmp_path: Path) -> None:
    write_sites(tmp_path / "scans", ("A",))
    script = tmp_path / "ask.py"
    script.write_text(
        "import pathlib, sys\n"
        "from flap_nvflare.bundle.workflow import build_work\n"
        "from flap_nvflare.flare.processes import train_in_processes\n"
        "from flap_nvflare.settings import Federation, Site\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "site = Site('A', folder / 'scans', device='cpu')\n"
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
        started = own_processes()
        assert len(started) == 1
        asking.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{started[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{started[0]}").exists()
