"""Processes forked from one that has imported: as `python -m` would run them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flap_nvflare.fork_server import Forked, ForkServer

SAYS = """
import json, os, sys
print(json.dumps([sys.argv[1:], __name__, os.environ.get("WORD"), os.getcwd(), os.getsid(0)]))
print("wave" in sys.modules, file=sys.stderr)
sys.exit(len(sys.argv) - 1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forks")
    (folder / "says.py").write_text(SAYS)
    (folder / "waits.py").write_text("import time; time.sleep(60)")
    (folder / "fails.py").write_text("raise ValueError('on purpose')")
    (folder / "ends_later.py").write_text(
        "import atexit, threading, time\n"
        "atexit.register(print, 'last', flush=True)\n"
        "def late():\n    time.sleep(0.5)\n    print('late', flush=True)\n"
        "threading.Thread(target=late).start()\n"
    )
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ForkServer]:
    server = ForkServer(folder / "socket", ["wave"])  # a module that nothing else imports
    yield server
    server.close()


def _run(server: ForkServer, folder: Path, *words: str, **environment: str) -> Forked:
    return server.run(words, {**os.environ, "PYTHONPATH": str(folder), **environment})


def test_arguments_environment_folder_and_output_are_the_callers(
    server: ForkServer,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    process = _run(server, folder, "says", "-o", "a b", WORD="known")
    assert process.wait(30) == 2
    assert process.poll() == 2
    said = capfd.readouterr()
    expected = f'[["-o", "a b"], "__main__", "known", "{folder}", {process.pid}]'
    assert said.out.strip() == expected  # in a session of its own
    assert said.err.strip() == "True"  # what the server has imported is there


def test_a_process_runs_until_it_is_ended(server: ForkServer, folder: Path) -> None:
    for end, number in ((Forked.terminate, signal.SIGTERM), (Forked.kill, signal.SIGKILL)):
        process = _run(server, folder, "waits")
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        end(process)
        assert process.wait(30) == -number
        process.terminate()  # of one that has ended: nothing
        process.kill()


def test_an_error_is_shown_and_the_next_process_runs(
    server: ForkServer, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run(server, folder, "fails").wait(30) == 1
    assert "ValueError: on purpose" in capfd.readouterr().err
    assert _run(server, folder, "says").wait(30) == 0


def test_threads_are_waited_for_and_what_is_to_be_done_at_the_end_is_done(
    server: ForkServer, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run(server, folder, "ends_later").wait(30) == 0
    assert capfd.readouterr().out == "late\nlast\n"


def test_a_server_that_can_not_import_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="ended with 1"):
        ForkServer(tmp_path / "socket", ["no_such_module"])


def test_a_closed_server_leaves_its_processes_and_answers_no_more(folder: Path) -> None:
    server = ForkServer(folder / "second", [])
    process = _run(server, folder, "waits")
    server.close()
    os.kill(process.pid, 0)  # is there
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    with pytest.raises(OSError, match="refused"):
        _run(server, folder, "says")
    end = time.monotonic() + 10
    while Path(f"/proc/{process.pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
