"""Processes that end with the one that started them, should that be killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(by: signal.Signals, parent: int = 0) -> None:
    """Lets the kernel send this process a signal when its parent is gone; on Linux alone.

    A killed parent cannot end its children itself, and those in a session of their own are
    reached by no signal to its group.

    Args:
        by: the signal.
        parent: the parent's number where it is known: it may be gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if parent and os.getppid() != parent:
        os.kill(os.getpid(), by)
