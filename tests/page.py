"""The commands of a page, typed into one shell as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from provisioned import free_port, kill

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "custom" / "README.md"
INSTALL = "pip install ./flap_nvflare"
PORT = "8002"  # the page's


def commands(text: str | None = None) -> list[str]:
    """The commands of a text, in their order; without one of the page for hospital IT."""
    if text is None:
        text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def environment(folder: Path) -> dict[str, str]:
    """A home of its own, and `flap-nvflare` of the package that is tested, installed or not."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    program = programs / "flap-nvflare"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flap_nvflare.cli "$@"\n')
    program.chmod(0o755)
    home = folder / "home"
    home.mkdir(exist_ok=True)
    known = {k: v for k, v in os.environ.items() if not k.startswith(("FLAP_", "NVFLARE"))}
    paths = (str(programs), str(Path(sys.executable).parent), known["PATH"])
    return {
        **known,
        "HOME": str(home),
        "PATH": ":".join(paths),
        "PYTHONPATH": f"{ROOT}:{known.get('PYTHONPATH', '')}",
    }


def processes_in(folder: Path) -> list[int]:
    """Processes whose command lines name the folder."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = line.read_bytes()
        except OSError:
            continue
        if str(folder).encode() + b"/" in text and int(line.parent.name) != os.getpid():
            found.append(int(line.parent.name))
    return found


def run_lines(
    lines: list[str],
    place: Path,
    environment: dict[str, str],
    seconds: float,
    logs: Callable[[], str] = str,
) -> list[str]:
    """Types the lines into one bash in `place`; fails with the output of the first that fails.

    Returns:
        What each of them printed.
    """
    folder = place.parent
    script = "".join(
        f"{{ {line}\n}} > {folder}/{number}.txt 2>&1 || exit {number}\n"
        for number, line in enumerate(lines, start=1)
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=seconds,
    )
    paths = [folder / f"{number}.txt" for number in range(1, len(lines) + 1)]
    said = [
        path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for path in paths
    ]
    code = done.returncode
    assert code == 0, f"command {code}: {lines[code - 1]}\n{said[code - 1]}{logs()}"
    return said


@dataclass
class Shell:
    """One bash in `folder`; `said` holds what each command printed."""

    folder: Path

    def __post_init__(self) -> None:
        self.place = self.folder / "place"  # the page's empty folder
        self.said: list[str] = []
        copy = self.place / "flap_nvflare"
        copy.mkdir(parents=True)
        for name in ("custom", "jobs"):
            shutil.copytree(ROOT / name, copy / name)
        # The one change: a port that is free, so that nobody else's server is in the way.
        project = copy / "custom" / "project.yml"
        text = project.read_text(encoding="utf-8")
        assert text.count(f": {PORT}\n") == 2
        project.write_text(text.replace(f": {PORT}\n", f": {free_port()}\n"), encoding="utf-8")

    def type(self, lines: list[str], seconds: float) -> None:
        """Runs them one after the other; fails with the output of the first that fails."""
        self.said = run_lines(lines, self.place, environment(self.folder), seconds, self.logs)

    def logs(self) -> str:
        logs = sorted(self.place.glob("*.txt"))
        return "\n".join(f"==== {log}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def end(self) -> None:
        """Ends what is left of the processes of these kits."""
        kill(processes_in(self.place))
