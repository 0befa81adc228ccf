"""Resident memory of a federation's processes, round by round.

    python tests/memory_over_rounds.py --rounds 30 --out memory.json

A server and two sites of a provisioned federation run small rounds. Once a round the memory of the
server's and a site's parent process and of their job processes is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from kill_campaign import SETTINGS, provisioned
from provisioned import SERVER, Provisioned

FIRST = 5  # before this round caches fill, and the allocators take what they need
SITE = "A"
# What is measured: member, and the module that its process runs.
PROCESSES = {
    "server": (SERVER, "server_train"),
    "server's job": (SERVER, "runner_process"),
    "site": (SITE, "client_train"),
    "site's job": (SITE, "worker_process"),
}


def resident(pid: int) -> float:
    """Resident memory of a process in 10^6 bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(samples: Sequence[float], first: int = FIRST) -> float:
    """Slope of the straight line through the samples from `first` on, by least squares."""
    ys = samples[first:]
    middle, mean = (len(ys) - 1) / 2, sum(ys) / len(ys)
    above = sum((x - middle) * (y - mean) for x, y in enumerate(ys))
    return above / sum((x - middle) ** 2 for x in range(len(ys)))


def measure(federation: Provisioned, seconds: float = 600.0) -> dict[str, list[float]]:
    """Runs the job; resident memory of every process at the end of each round but the last."""
    rounds = int(federation.settings["rounds"])
    found: dict[str, list[float]] = {name: [] for name in PROCESSES}
    federation.start()
    session = federation.session()
    job = federation.submit(session)
    end = time.monotonic() + seconds
    while (done := len(federation.rounds())) < rounds:
        taken = len(found["server"])
        if done > taken:
            if done > taken + 1:
                raise RuntimeError(f"round {taken} ended unseen; the rounds are too short")
            for name, (member, module) in PROCESSES.items():
                (pid,) = federation.pids(member, f".{module} ")
                found[name].append(round(resident(pid), 3))
        if time.monotonic() > end:
            raise TimeoutError(f"{done} of {rounds} rounds in {seconds} s\n{federation.logs()}")
        time.sleep(0.1)
    federation.wait(session, job)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the samples and prints the growth of each process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--own-process", default="off", choices=["on", "off"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="memory_"))
    federation = small_federation(folder, given.rounds, given.own_process)
    try:
        samples = measure(federation)
    finally:
        federation.stop()
    table: dict[str, Any] = {
        name: {"mb_a_round": round(growth(values), 3), "mb": values}
        for name, values in samples.items()
    }
    given.out.write_text(json.dumps(table) + "\n", encoding="utf-8")
    for name, one in table.items():
        print(f"{name:14} {one['mb'][FIRST]:8.1f} MB  {one['mb_a_round']:+.3f} MB a round")
    sys.stdout.flush()
    os._exit(0)  # the administrator's connections keep threads of their own


def small_federation(folder: Path, rounds: int, own_process: str = "off") -> Provisioned:
    """A server and two sites; a round takes about two seconds."""
    settings = {**SETTINGS, "rounds": rounds, "local_epochs": 1, "cross_site": "global"}
    return provisioned(folder, settings, sites=("A", "B"), own_process=own_process)


if __name__ == "__main__":
    main()
