"""Memory of FLARE's simulator and of its sites' processes while they run, by round.

A page that several processes share (code of torch, weights from a file) counts for each with its
share, PSS, so that sums hold. On Linux, whose /proc tells it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

# In the command lines of sites' processes: those that were started, and those that were forked,
# which have that of their server.
SITE_MODULES = (
    "nvflare.private.fed.app.simulator.simulator_worker",
    "flap_nvflare.fork_server",
)
PERIOD = 1.0
# Looking at a process costs the kernel a walk through its pages: at most a tenth of the time.
_SHARE = 0.1


class StoppedError(RuntimeError):
    """The simulation was ended before it was done; the message says why."""


@dataclass(frozen=True)
class Peaks:
    """Peaks of memory in one round, or in what comes before or after the rounds.

    Attributes:
        round: finished rounds at that time.
        server: bytes of the simulator's own processes, in which the server runs.
        sites: bytes of all sites' processes together, the server of forks among them.
        processes: the most of them at one time.
        site: bytes of the largest process of a site.
    """

    round: int
    server: int
    sites: int
    processes: int
    site: int

    def over(self, other: Peaks) -> Peaks:
        """The larger of every figure."""
        return Peaks(
            self.round,
            max(self.server, other.server),
            max(self.sites, other.sites),
            max(self.processes, other.processes),
            max(self.site, other.site),
        )


def sample(root: psutil.Process, finished: int) -> Peaks:
    """What the tree of processes below and with `root` holds now."""
    server, sites = 0, []
    for process in (root, *root.children(recursive=True)):
        try:
            of_site = not {*SITE_MODULES}.isdisjoint(process.cmdline())
            held = int(process.memory_full_info().pss)
        except psutil.Error:  # has just ended
            continue
        if of_site:
            sites.append(held)
        else:
            server += held
    return Peaks(finished, server, sum(sites), len(sites), max(sites, default=0))


def watch(
    process: subprocess.Popen[bytes],
    finished: Callable[[], int],
    seconds: float,
    spare: float = 1e9,
) -> list[Peaks]:
    """Peaks of every round until the process ends.

    Args:
        process: FLARE's simulator.
        finished: number of rounds that have ended.
        seconds: how long it may take.
        spare: bytes of the machine's memory that must stay free.

    Raises:
        StoppedError: if it takes longer, or if the memory runs short; all processes are ended.
    """
    root = psutil.Process(process.pid)
    found: dict[int, Peaks] = {}
    end = time.monotonic() + seconds
    try:
        while process.poll() is None:
            started = time.monotonic()
            now = sample(root, finished())
            found[now.round] = now.over(found.get(now.round, now))
            free = psutil.virtual_memory().available
            if free < spare:
                raise StoppedError(
                    f"{free / 1e9:.1f} GB of memory are free with {now.processes} sites' processes "
                    f"of {now.sites / 1e9:.1f} GB; give fewer threads"
                )
            if started > end:
                raise StoppedError(f"not done after {seconds:g} s, in round {now.round + 1}")
            time.sleep(max(PERIOD, (time.monotonic() - started) * (1 / _SHARE - 1)))
    except psutil.NoSuchProcess:
        pass  # has ended while we looked
    finally:
        _end(root)
        process.wait()
    return [found[key] for key in sorted(found)]


def _end(root: psutil.Process) -> None:
    """Ends what is left of the simulation."""
    try:
        left = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
