"""Processes that end with the one that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

_CHILD = """
import os, signal, time
from flap_nvflare.parents import end_with_parent
end_with_parent(signal.SIGKILL, {parent})
print(os.getpid(), flush=True)
time.sleep(60)
"""
# Starts the child and is killed once that has spoken.
_PARENT = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only the kernel of Linux tells a child")
def test_a_child_does_not_outlive_a_killed_parent() -> None:
    command = [sys.executable, "-c", _PARENT, _CHILD.format(parent=0)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    end = time.monotonic() + 20
    while _runs(int(said)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_child_that_starts_after_its_parent_is_gone_ends_at_once() -> None:
    nobody = os.getppid()  # of the child, we are the parent
    command = [sys.executable, "-c", _CHILD.format(parent=nobody)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (-9, "")


def _runs(pid: int) -> bool:
    """Whether the process is there, and more than an entry that nobody has fetched."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
