"""A cell under FLARE's simulator: a process of its own, whose run's files are read at its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flap_nvflare.settings import DATA_VARIABLE, HOME_VARIABLE, RESUME_VARIABLE, Federation

LOG = "simulator.log"
_SETTINGS = "settings.json"
_JOB = "cell"


def simulate(
    federation: Federation, root: Path, sites: Sequence[str], folder: Path, threads: int
) -> dict[str, Any]:
    """Runs the federation as FLARE's recipe and reads its run's folder.

    A run that was broken off goes on after its last finished round.

    Args:
        federation: the settings.
        root: folder of scans.
        sites: names of the sites.
        folder: the cell's; `home` in it becomes FLAP_HOME.
        threads: sites at work at a time.

    Returns:
        {parameters, seconds, mean, sites, wire, rounds} as a cell has them.

    Raises:
        RuntimeError: if the run does not come to its end; its log's last lines are in the message.
    """
    home = folder / "home"
    settings = folder / _SETTINGS
    settings.write_text(json.dumps(federation.to_dict()), encoding="utf-8")
    environment = {
        **os.environ,
        HOME_VARIABLE: str(home.resolve()),
        DATA_VARIABLE: str(root.resolve()),
    }
    if any((home / "runs" / _JOB).glob("*/adapter_last.safetensors")):
        environment[RESUME_VARIABLE] = "last"
    command = [
        *(sys.executable, "-m", "flap_nvflare.flare.simulate"),
        *(str(settings), str(folder / "workspace"), _JOB, str(threads), *sites),
    ]
    started = time.perf_counter()
    with (folder / LOG).open("w", encoding="utf-8") as log:
        code = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    seconds = time.perf_counter() - started
    runs = sorted((home / "runs" / _JOB).glob("*/cross_site.json"))
    if code or not runs:  # FLARE ends a refused job with 0
        last = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        raise RuntimeError(
            f"{folder}: the run ended with {code}, its log with:\n" + "\n".join(last)
        )
    return {"seconds": round(seconds, 1), **read_run(runs[-1].parent, federation)}


def read_run(run: Path, federation: Federation) -> dict[str, Any]:
    """The figures of a finished run's folder."""
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
        "mean": {
            name: _mean([dice.get(name) for dice in sites.values()])
            for name in (*federation.class_names, "mean")
        },
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
