"""Times and peaks of ways to do one thing, taken in turn so that a busy machine is fair to all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: what was done.
        ours: our figure.
        reference: the other's; None where there is none.
        ratio: for seconds, how many times faster ours is; for bytes, ours as a share.
        unit: of both figures.
        note: what the two are.
    """

    name: str
    ours: float
    reference: float | None
    ratio: float | None
    unit: str
    note: str = ""


def speed(name: str, ours: float, reference: float, note: str) -> Row:
    """A row of seconds: the ratio is how many times faster ours is."""
    return Row(name, ours, reference, reference / ours, "s", note)


def share(name: str, ours: float, reference: float, unit: str, note: str) -> Row:
    """A row whose ratio is ours as a share of the reference."""
    return Row(name, ours, reference, ours / reference, unit, note)


def in_turn(
    ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Seconds of the fastest run of every way; all ways run once, then again, and so on.

    On a GPU the time between two events of the stream, after a synchronised start.
    """
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(repeats + 1):
        for name, way in ways.items():
            seconds = _timed(way, device)
            if turn:  # the first run pays for caches and kernels
                best[name] = min(best[name], seconds)
    return best


def _timed(way: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        way()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    way()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def peak_bytes(way: Callable[[], object], device: torch.device) -> int:
    """Peak of memory above what is held when `way` starts; it runs once before to settle.

    On a CPU in a process of its own only: what an earlier step left to the allocator counts as
    held, and would hide the peak.
    """
    if device.type == "cuda":
        way()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        way()
        return torch.cuda.max_memory_allocated(device) - held
    gc.collect()
    held = process_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    way()
    return process_bytes("VmHWM") - held


def process_bytes(field: str) -> int:
    """Bytes of this process: `VmRSS` now, or `VmHWM` at its peak.

    Not getrusage: its peak begins with that of the process that started this one.

    Raises:
        OSError: where /proc does not tell, which only Linux's does.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; measure on Linux")
