"""What a round of many sites costs under FLARE's simulator, on this machine.

    python -m flap_nvflare.bench.scale jobs/fed_kits --sites 10 50 100 --threads 8 --out rows.jsonl

Synthetic scans, two training cases and one test case a site. Each row is a run of `nvflare
simulator` as a user starts it, or with --forked of `flap_nvflare.flare.forked_simulator`, watched
from outside; all else comes from the files that it leaves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from flap_nvflare.bench.watch import Peaks, StoppedError, watch
from flap_nvflare.data.phantoms import Phantoms, phantom_sites, write_phantoms
from flap_nvflare.settings import DATA_VARIABLE, Federation, SettingsError

SETTINGS: Mapping[str, Any] = {
    "profile": "demo",
    "rounds": 2,
    "image_size": 48,
    "local_epochs": 1,
    "cross_site": "global",
}
TRAIN, TEST = 2, 1
_ERROR = re.compile(r"^\S+ \S+ - (?:\S+ - )?(?:ERROR|CRITICAL) - (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class ScaleFigures:
    """What one run cost.

    Attributes:
        sites, threads: of the run; with as many threads as sites their processes stay, with fewer
            every task of a site is a process of its own.
        forked: whether those processes were forked from one that had imported all they need.
        settings: what the job's settings were changed to.
        round_seconds: of every round that ended, from the server's task to its aggregate.
        seconds: of the whole command, the scores at the end included.
        cpu_seconds: of all its processes together.
        bytes_up, bytes_down: of all sites together by round, as serialised.
        peaks: memory by round.
        dice: test Dice of the last adapter by class, mean over the sites.
        scored: sites that scored it.
        lost: rounds' sites that were asked and have no update in the aggregate.
        errors: lines of FLARE's log at level ERROR and above, the first ten.
        versions: of Python and the packages.
    """

    sites: int
    threads: int
    forked: bool
    settings: Mapping[str, Any]
    round_seconds: tuple[float, ...]
    seconds: float
    cpu_seconds: float
    bytes_up: tuple[int, ...]
    bytes_down: tuple[int, ...]
    peaks: tuple[Peaks, ...]
    dice: Mapping[str, float]
    scored: int
    lost: int
    errors: tuple[str, ...]
    versions: Mapping[str, str]


TABLE_HEAD = (
    "| sites | threads | start | rounds | s a round | s in all | CPU s in all | MB up | MB down "
    "| server MB | sites MB | processes | test Dice | lost, errors |\n"
    "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def table_line(one: ScaleFigures) -> str:
    """The figures as a line of a Markdown table under `TABLE_HEAD`; bytes are a round's."""
    mega = [
        f"{value / 1e6:,.1f}"
        for value in (
            statistics.mean(one.bytes_up),
            statistics.mean(one.bytes_down),
            max(peaks.server for peaks in one.peaks),
            max(peaks.sites for peaks in one.peaks),
        )
    ]
    cells = (
        f"{one.sites}",
        f"{one.threads}",
        "forked" if one.forked else "new",
        f"{len(one.round_seconds)}",
        ", ".join(f"{seconds:.0f}" for seconds in one.round_seconds),
        f"{one.seconds:.0f}",
        f"{one.cpu_seconds:.0f}",
        *mega,
        f"{max(peaks.processes for peaks in one.peaks)}",
        f"{100 * one.dice['mean']:.1f}",
        f"{one.lost}, {len(one.errors)}",
    )
    return f"| {' | '.join(cells)} |"


def measure(
    job: Path,
    sites: int,
    threads: int,
    settings: Mapping[str, Any],
    folder: Path,
    forked: bool = False,
    timeout: float = 3600.0,
) -> ScaleFigures:
    """Runs the job with so many sites and says what it cost.

    Args:
        job: folder of a FLARE job of this package.
        sites: number of sites.
        threads: FLARE's `-t`; with more than there are sites it is that number.
        settings: changes to the job's `federation.yaml`.
        folder: empty or of an earlier call; scans, job and results lie there.
        forked: whether `flare.forked_simulator` runs it in place of `nvflare simulator`.
        timeout: seconds the run may take.

    Raises:
        StoppedError: if it took longer, memory ran short, or it left no result.
        SettingsError: if a setting is none.
    """
    threads = min(threads, sites)
    federation = _federation(settings)
    phantoms = Phantoms(sites=sites, train=TRAIN, test=TEST)
    scans = folder / f"scans_{sites}"
    _write_scans(scans, phantoms)
    home = Path(tempfile.mkdtemp(prefix=f"sites_{sites}_threads_{threads}_", dir=folder))
    ours = make_job(job, home / "job", phantom_sites(phantoms), settings)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with (home / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [*_simulator(forked), str(ours), "-w", str(home / "work"), "-t", str(threads)],
            env=_environment(home, scans),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        peaks = watch(process, lambda: len(_lines(home)), timeout)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if len(_lines(home)) < federation.rounds:
        raise StoppedError(
            f"{len(_lines(home))} of {federation.rounds} rounds ended; see {home / 'output.txt'}"
        )
    return ScaleFigures(
        sites=sites,
        threads=threads,
        forked=forked,
        settings=dict(settings),
        seconds=round(seconds, 1),
        cpu_seconds=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        peaks=tuple(peaks),
        **results(home),
        versions={
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("nvflare", "torch", "monai")},
        },
    )


def make_job(job: Path, folder: Path, sites: Sequence[str], settings: Mapping[str, Any]) -> Path:
    """A copy of a job for other sites, which FLARE's simulator takes from its `deploy_map`.

    Returns:
        The copy, in `folder` under the job's own name.
    """
    copy = folder / job.name
    shutil.copytree(job, copy)
    meta = json.loads((copy / "meta.json").read_text(encoding="utf-8"))
    for app, members in meta["deploy_map"].items():
        if "server" in members:
            meta["deploy_map"][app] = ["server", *sites]
    (copy / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    path = copy / "app" / "config" / "federation.yaml"
    known = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**known, **settings}), encoding="utf-8")
    return copy


def results(home: Path) -> dict[str, Any]:
    """What a run's own files say: the figures of `ScaleFigures` that no watching gives."""
    lines = _lines(home)
    scores = json.loads(_run_file(home, "cross_site.json").read_text(encoding="utf-8"))["last"]
    names = sorted({name for score in scores.values() for name in score["dice"]})
    known = {
        name: [one["dice"][name] for one in scores.values() if one["dice"].get(name) is not None]
        for name in names
    }
    said = (home / "output.txt").read_text(encoding="utf-8", errors="replace")
    return {
        "round_seconds": tuple(line["seconds"] for line in lines),
        "bytes_up": tuple(_bytes(line, "up") for line in lines),
        "bytes_down": tuple(_bytes(line, "down") for line in lines),
        "dice": {name: round(statistics.mean(found), 4) for name, found in known.items() if found},
        "scored": len(scores),
        "lost": sum(len(set(line["taking_part"]) - set(line["sites"])) for line in lines),
        "errors": tuple(text[:200] for text in _ERROR.findall(said)[:10]),
    }


def _bytes(line: Mapping[str, Any], way: str) -> int:
    return sum(ways[way] for ways in line["bytes"].values())


def _lines(home: Path) -> list[dict[str, Any]]:
    path = _run_file(home, "rounds.jsonl")
    if not path.is_file():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def _run_file(home: Path, name: str) -> Path:
    return next(iter(home.glob(f"flap/runs/*/*/{name}")), home / name)


def _federation(settings: Mapping[str, Any]) -> Federation:
    changes = dict(settings)
    return Federation.of_profile(changes.pop("profile", "auto"), changes)


def _write_scans(folder: Path, phantoms: Phantoms) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"scans of {phantoms.sites} sites", total=None)
        write_phantoms(
            folder,
            phantoms,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _simulator(forked: bool) -> list[str]:
    ours, plain = ["flap_nvflare.flare.forked_simulator"], ["nvflare.cli", "simulator"]
    return [sys.executable, "-m", *(ours if forked else plain)]


def _environment(home: Path, scans: Path) -> dict[str, str]:
    """Nothing of the caller's own settings, and a home of its own."""
    kept = {key: v for key, v in os.environ.items() if not key.startswith(("FLAP_", "NVFLARE"))}
    return {**kept, "HOME": str(home), "FLAP_HOME": str(home / "flap"), DATA_VARIABLE: str(scans)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m flap_nvflare.bench.scale`."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.bench.scale",
        description="Measure rounds of many sites under FLARE's simulator.",
    )
    parser.add_argument("job", type=Path, help="folder of a job, such as jobs/fed_kits")
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--threads", type=int, nargs="+", default=[8], help="of the simulator")
    parser.add_argument(
        "--forked", action="store_true", help="fork the sites' processes: flare.forked_simulator"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"settings; {dict(SETTINGS)}"
    )
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a run may take")
    parser.add_argument("--out", type=Path, help="file to which each run adds a JSON line")
    parser.add_argument("--folder", type=Path, help="keeps scans, logs and results there")
    parsed = parser.parse_args(arguments)
    changes = (text.partition("=") for text in parsed.set)
    settings = {**SETTINGS, **{name: yaml.safe_load(value) for name, _, value in changes}}
    # Also `timeout` and a job's time limit end the simulator with all its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("scale: ended by SIGTERM"))
    with ExitStack() as stack:
        folder = parsed.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            print(f"{os.cpu_count()} cores\n\n{TABLE_HEAD}", flush=True)
            for sites in parsed.sites:
                for threads in parsed.threads:
                    one = measure(
                        parsed.job,
                        sites,
                        threads,
                        settings,
                        folder,
                        parsed.forked,
                        parsed.timeout,
                    )
                    print(table_line(one), flush=True)
                    if parsed.out:
                        with parsed.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(dataclasses.asdict(one)) + "\n")
        except (StoppedError, SettingsError, OSError) as error:
            print(f"scale: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
