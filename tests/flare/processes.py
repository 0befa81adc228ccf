"""Processes that FLARE starts: finding them and ending them by their ids."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from signal import SIGKILL


def stop(process: subprocess.Popen[str]) -> None:
    """Ends the simulator's session: its server, and the sites, which have sessions of their own."""
    for pid in descendants(process.pid):
        try:
            os.kill(pid, SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(30)


def descendants(pid: int) -> list[int]:
    """The process and all below it, by /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, []))
    return found
