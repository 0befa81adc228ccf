"""Real FLARE simulations of a job, made smaller by its one settings file."""

from __future__ import annotations

import json
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
from processes import stop

JOBS = Path(__file__).parents[2] / "jobs"


@dataclass
class Simulation:
    """One job in one home folder; `start` may be called again to go on with the run."""

    folder: Path
    sites: Sequence[str] = ("A", "B")
    changes: dict[str, Any] = field(default_factory=dict)
    name: str = "fed_kits"

    @property
    def home(self) -> Path:
        return self.folder / "flap"

    def config(self, name: str) -> Path:
        """A file of the job's config, in a copy of the job made with the changed settings."""
        job = self.folder / self.name
        if not job.exists():
            shutil.copytree(JOBS / self.name, job)
            settings = job / "app" / "config" / "federation.yaml"
            values = yaml.safe_load(settings.read_text(encoding="utf-8"))
            settings.write_text(yaml.safe_dump({**values, **self.changes}), encoding="utf-8")
        return job / "app" / "config" / name

    def start(
        self, threads: int | None = None, forked: bool = False, **environment: str
    ) -> subprocess.Popen[str]:
        job = self.config("federation.yaml").parents[2]
        command = [str(Path(sys.executable).parent / "nvflare"), "simulator"]
        if forked:
            command = [sys.executable, "-m", "flap_nvflare.flare.forked_simulator"]
        command.append(str(job))
        command += ["-c", ",".join(self.sites), "-t", str(threads or len(self.sites))]
        return self._popen([*command, "-w", str(self.folder / "work")], **environment)

    def start_recipe(self, **environment: str) -> subprocess.Popen[str]:
        """The same federation by `FlapRecipe` and FLARE's SimEnv, in a script of its own."""
        script = self.folder / "federate.py"
        script.write_text(
            "from nvflare.recipe import SimEnv\n"
            "from flap_nvflare.flare.recipe import FlapRecipe\n"
            "if __name__ == '__main__':\n"
            f"    env = SimEnv(clients={list(self.sites)}, workspace_root={str(self.folder)!r})\n"
            f"    FlapRecipe(**{self.changes}).execute(env)\n",
            encoding="utf-8",
        )
        return self._popen([sys.executable, str(script)], **environment)

    def _popen(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
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
        return self.finish(self.start(threads, **environment), timeout)

    def finish(self, process: subprocess.Popen[str], timeout: float = 240) -> Path:
        """Waits for the end, ends what is left, and returns the run's folder."""
        try:
            process.wait(timeout)
        finally:
            stop(process)
        runs = sorted((self.home / "runs" / self.name).glob("*"))
        assert runs, self.output()[-3000:]
        return runs[-1]

    def lines(self, run: Path) -> list[dict[str, Any]]:
        """The lines of a run's rounds.jsonl; fails with the log if there are none."""
        path = run / "rounds.jsonl"
        assert path.is_file(), self.output()[-4000:]
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8")


@pytest.fixture
def simulation(tmp_path: Path) -> Callable[..., Simulation]:
    def make(folder_name: str = "first", **values: Any) -> Simulation:
        folder = tmp_path / folder_name
        folder.mkdir()
        return Simulation(folder, **values)

    return make
