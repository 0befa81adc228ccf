"""Python modules run in processes that are forked from one which has imported all they need.

Importing torch and MONAI takes seconds and a few hundred MB; a fork takes milliseconds, and what
was imported stays one copy in memory. The server of forks has no thread of its own and imports
only, so that nothing is lost in a fork. For Linux and macOS.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_REAP = 0.1  # seconds between two looks for processes that have ended
_NUMBER = struct.Struct("!i")


class ForkServer:
    """A process that has imported some modules, and forks one process for each `run`.

    Args:
        path: of its socket; in a folder that only this user may enter.
        modules: what it imports before the first fork.

    Raises:
        OSError: if it does not come up; its own error is on stderr.
    """

    def __init__(self, path: Path, modules: Sequence[str]) -> None:
        self._path = path
        command = [sys.executable, "-m", __name__, str(path), *modules]
        # It ends when this end of the pipe is closed, as the system does it whatever happens.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        while not path.exists():
            if self._process.poll() is not None:
                raise OSError(f"the server of forks ended with {self._process.returncode}")
            time.sleep(0.05)

    def run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Forked:
        """Runs `python -m MODULE ARGUMENTS` in a new session, with this process's output."""
        return Forked(self._path, arguments, environment)

    def close(self) -> None:
        """Ends the server; what it has forked goes on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Forked:
    """A forked process; of the methods of `subprocess.Popen` those that FLARE's simulator calls.

    Args:
        path: the server's socket.
        arguments: the module and its arguments.
        environment: of the process.
    """

    def __init__(
        self, path: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._link.connect(str(path))
        said = json.dumps([list(arguments), dict(environment), str(Path.cwd())]).encode()
        streams = array.array("i", [1, 2])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        self._link.sendmsg([_NUMBER.pack(len(said))], rights)
        self._link.sendall(said)
        self.pid: int = _NUMBER.unpack(_exactly(self._link, _NUMBER.size))[0]

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        try:
            self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, of a killed process the signal's number below zero.

        Raises:
            subprocess.TimeoutExpired: if it runs longer.
        """
        with self._lock:
            if self.returncode is None:
                self._link.settimeout(timeout)
                try:
                    self.returncode = _NUMBER.unpack(_exactly(self._link, _NUMBER.size))[0]
                except (BlockingIOError, TimeoutError):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
                except ConnectionError:  # the server is gone, and nobody knows
                    self.returncode = -signal.SIGKILL
                self._link.close()
            return self.returncode

    def terminate(self) -> None:
        """Asks it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _exactly(link: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = link.recv(size - len(found))
        if not part:
            raise ConnectionError("the other end is gone")
        found += part
    return found


def _serve(path: Path, modules: Sequence[str]) -> None:
    """The server's own work, until stdin is closed."""
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would write to pages that are shared
    waiting: dict[int, socket.socket] = {}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    hidden = path.with_name(f".{path.name}")
    listener.bind(str(hidden))
    listener.listen(256)
    hidden.rename(path)  # who sees the path can connect
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(sys.stdin, selectors.EVENT_READ)
        while True:
            events = [key.fileobj for key, _ in ready.select(_REAP)]
            if sys.stdin in events:
                return
            if listener in events:
                link, _ = listener.accept()
                pid = _fork(link, [listener, *waiting.values()])
                waiting[pid] = link
            _reap(waiting)


def _fork(link: socket.socket, others: Sequence[socket.socket]) -> int:
    """Forks a process for a request; returns its number in the server only."""
    size = array.array("i").itemsize
    head, rights, _, _ = link.recvmsg(_NUMBER.size, socket.CMSG_SPACE(2 * size))
    streams = array.array("i", rights[0][2])
    said = _exactly(link, _NUMBER.unpack(head)[0])
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        link.sendall(_NUMBER.pack(pid))
        return pid
    code = 1
    try:
        for other in (link, *others):
            other.close()
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, number in zip(streams, (1, 2), strict=True):
            os.dup2(stream, number)
            os.close(stream)
        code = _run(*json.loads(said))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str], environment: dict[str, str], folder: str) -> int:
    """`python -m` of the arguments, in the process that was forked."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for entry in reversed(environment.get("PYTHONPATH", "").split(os.pathsep)):
        if entry and entry not in sys.path:
            sys.path.insert(1, entry)
    module, *rest = arguments
    sys.argv = [module, *rest]
    sys.modules.pop(module, None)  # it runs as the main module, once more
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    # What `python` does at its end: threads that are no daemons keep the process alive.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return 0


def _reap(waiting: dict[int, socket.socket]) -> None:
    """Tells of every process that has ended how it did."""
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        link = waiting.pop(pid)
        with contextlib.suppress(OSError):  # nobody waits for it any more
            link.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(status)))
        link.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(Path(sys.argv[1]), sys.argv[2:])
