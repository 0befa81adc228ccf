"""Real FLARE simulations of the fed_kits job, made smaller by its one settings file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

JOB = Path(__file__).parents[2] / "jobs" / "fed_kits"


@dataclass
class Simulation:
    """One job in one home folder; `start` may be called again to go on with the run."""

    folder: Path
    sites: Sequence[str] = ("A", "B")
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "flap"

    def start(self, threads: int | None = None, **environment: str) -> subprocess.Popen[str]:
        job = self.folder / "fed_kits"
        if not job.exists():
            shutil.copytree(JOB, job)
            settings = job / "app" / "config" / "federation.yaml"
            values = yaml.safe_load(settings.read_text(encoding="utf-8"))
            settings.write_text(yaml.safe_dump({**values, **self.changes}), encoding="utf-8")
        return subprocess.Popen(
            [
                str(Path(sys.executable).parent / "nvflare"),
                *("simulator", str(job), "-w", str(self.folder / "work")),
                *("-c", ",".join(self.sites), "-t", str(threads or len(self.sites))),
            ],
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith("FLAP_")},
                "FLAP_HOME": str(self.home),
                "HOME": str(self.folder),
                **environment,
            },
            stdout=(self.folder / "output.txt").open("a"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, threads: int | None = None, timeout: float = 240, **environment: str) -> Path:
        """Runs to the end and returns the run's folder, whose artifacts are the proof."""
        process = self.start(threads, **environment)
        try:
            process.wait(timeout)
        finally:
            stop(process)
        runs = sorted((self.home / "runs" / "fed_kits").glob("*"))
        assert runs, self.output()[-3000:]
        return runs[-1]

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8")


def stop(process: subprocess.Popen[str]) -> None:
    """Ends the simulator's session: its server, and the sites, which have sessions of their own."""
    from signal import SIGKILL

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


@pytest.fixture
def simulation(tmp_path: Path) -> Callable[..., Simulation]:
    def make(name: str = "first", **values: Any) -> Simulation:
        folder = tmp_path / name
        folder.mkdir()
        return Simulation(folder, **values)

    return make
