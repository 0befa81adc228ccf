"""A cell under FLARE's simulator: a process of its own, whose run's files are read at its end."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flap_nvflare.settings import (
    DATA_VARIABLE,
    HOME_VARIABLE,
    RESUME_VARIABLE,
    Federation,
    SettingsError,
)

LOG = "simulator.log"
_SETTINGS, _BEGUN = "settings.json", "begun.json"
_HOME, _WORKSPACE, _JOB = "home", "workspace", "cell"
# By FLARE's own pattern for clients; its server has the other name.
_CLIENT = re.compile(r"(?!server$)[A-Za-z0-9][A-Za-z0-9_-]*")
_MOST_CLIENTS = 100
_MOVED = "NVFLARE_SIMULATOR_WORKSPACE_ROOT"  # would lay the workspaces of all cells on one another


def check_names(sites: Sequence[str], folder: Path) -> None:
    """Refuses sites or a folder that FLARE's simulator, a command line, would not take as they are.

    Raises:
        SettingsError: naming the site or the folder.
    """
    for site in sites:
        if not _CLIENT.fullmatch(site):
            raise SettingsError(
                f"site {site!r}: FLARE takes names of letters a to z, digits, _ and -, and not "
                "'server'; rename it in sites.csv, or choose engine: process"
            )
    if len(sites) > _MOST_CLIENTS:
        raise SettingsError(
            f"{len(sites)} sites: FLARE's simulator takes {_MOST_CLIENTS}; choose engine: process"
        )
    path = str(folder.resolve())
    if shlex.split(path, comments=True) != [path]:
        raise SettingsError(
            f"{path}: FLARE's simulator takes no blanks, quotes or # in it; name another by --out"
        )


def simulate(
    federation: Federation, root: Path, sites: Sequence[str], folder: Path, threads: int
) -> dict[str, Any]:
    """Runs the federation as FLARE's recipe and reads its run's folder.

    A run that was broken off goes on after its last finished round, if its settings, scans and
    sites are still the same; otherwise it begins anew.

    Args:
        federation: the settings.
        root: folder of scans.
        sites: names of the sites.
        folder: the cell's; `home` in it becomes FLAP_HOME.
        threads: sites at work at a time.

    Returns:
        {parameters, seconds, mean, sites, wire, rounds} as a cell has them; `seconds` are those
        since the last start.

    Raises:
        SettingsError: if FLARE does not take a site's name.
        RuntimeError: if the run does not come to its end; its log's last lines are in the message.
    """
    check_names(sites, folder)
    folder = folder.resolve()
    home = folder / _HOME
    _begin(federation, root, sites, folder)
    command = [
        *(sys.executable, "-m", "flap_nvflare.flare.simulate"),
        *(str(folder / _SETTINGS), str(folder / _WORKSPACE), _JOB, str(threads), *sites),
    ]
    started = time.perf_counter()
    code = _wait_for(command, _environment(home, root), folder / LOG)
    seconds = time.perf_counter() - started
    runs = sorted((home / "runs" / _JOB).glob("*/cross_site.json"))
    if code or not runs:  # FLARE ends a refused job with 0
        last = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        raise RuntimeError(
            f"{folder / LOG}: the run ended with {code}, its log with:\n" + "\n".join(last)
        )
    return {"seconds": round(seconds, 1), **read_run(runs[-1].parent, federation)}


def _begin(federation: Federation, root: Path, sites: Sequence[str], folder: Path) -> None:
    """Lays out the folder: a run of the same settings, scans and sites stays, any other goes."""
    from flap_nvflare.adapter.update import write_atomic

    settings = federation.to_dict()
    begun = {"federation": settings, "root": str(root.resolve()), "sites": list(sites)}
    text = json.dumps(begun, indent=1)
    path = folder / _BEGUN
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        if (folder / _HOME).exists():
            shutil.rmtree(folder / _HOME)
        write_atomic(path, text.encode())
    if (folder / _WORKSPACE).exists():  # whose files may be cut off; it holds nothing of the run
        shutil.rmtree(folder / _WORKSPACE)
    write_atomic(folder / _SETTINGS, json.dumps(settings).encode())


def _environment(home: Path, root: Path) -> dict[str, str]:
    ours = {HOME_VARIABLE: str(home), DATA_VARIABLE: str(root.resolve())}
    if any((home / "runs" / _JOB).glob("*/adapter_last.safetensors")):
        ours[RESUME_VARIABLE] = "last"
    theirs = {name: one for name, one in os.environ.items() if name != RESUME_VARIABLE}
    theirs.pop(_MOVED, None)
    return {**theirs, **ours}


def _wait_for(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # on which it ends FLARE's processes
            raise


def read_run(run: Path, federation: Federation) -> dict[str, Any]:
    """The figures of a finished run's folder."""
    from flap_nvflare.in_process import site_means
    from flap_nvflare.sam.tuning import count

    scores = json.loads((run / "cross_site.json").read_text(encoding="utf-8"))["last"]
    sites = {site: score["dice"] for site, score in scores.items()}
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    sizes = count(federation.arch, federation.image_size, federation.classes, federation.rank)
    size = {one.method: one for one in sizes}
    rounds = [_round(line) for line in lines]
    messages = sum(len(line["sites"]) for line in lines)
    return {
        "parameters": size[federation.method].parameters,
        "mean": site_means(scores.values(), federation),
        "sites": sites,
        "wire": {
            "up": sum(one["up"] for one in rounds) / messages,
            "down": sum(one["down"] for one in rounds) / messages,
            "full": size["full"].bytes,
            "error": _mean([one["error"] for one in rounds]),
            "seconds": _mean([one["rule_seconds"] for one in rounds]),
        },
        "rounds": rounds,
    }


def _round(line: dict[str, Any]) -> dict[str, Any]:
    sites = line["sites"].values()
    return {
        "round": line["round"],
        "seconds": line["seconds"],
        "up": sum(site["bytes_up"] for site in sites),
        "down": sum(site["bytes_down"] for site in sites),
        "error": line["aggregation_error"],
        "rule_seconds": line["aggregation_seconds"],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
