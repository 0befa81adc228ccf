"""Kill a site or the server in round 2: the same command with FLAP_RESUME=last goes on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import descendants, stop
from test_coded_runs import CODED

SETTINGS = {"rounds": 4, "image_size": 64, "batch_size": 16, "cross_site": "global"}


def sha256(run: Path, name: str) -> str:
    return hashlib.sha256((run / f"{name}.safetensors").read_bytes()).hexdigest()


def finished_rounds(home: Path) -> int:
    return sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for path in (home / "runs" / "fed_kits").glob("*/rounds.jsonl")
    )


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the state to wait for never came"
        time.sleep(0.1)


def process_of(parents: Sequence[int], word: str) -> int:
    """The one process among `parents` whose command line has `word`."""
    found = [
        pid
        for pid in parents
        if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    assert len(found) == 1, found
    return found[0]


SCAFFOLD = {"rule": "residual", "optimizer": "scaffold", "image_size": 32}
CASES = (
    ("site", {}, "site", pytest.mark.long),
    ("server", {}, "server", pytest.mark.slow),
    ("server", SCAFFOLD, "server, residual and scaffold", pytest.mark.long),
    ("server", {**CODED, "image_size": 32}, "server, coded", pytest.mark.long),
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("victim", "more"),
    [pytest.param(victim, more, id=name, marks=mark) for victim, more, name, mark in CASES],
)
def test_goes_on_from_the_last_finished_round_with_equal_bytes(
    simulation: Callable, victim: str, more: dict[str, Any]
) -> None:
    settings = {**SETTINGS, **more}
    undisturbed = simulation("undisturbed", changes=settings).run()

    disturbed = simulation("disturbed", changes=settings)
    process = disturbed.start()
    try:
        wait_for(lambda: finished_rounds(disturbed.home) >= 1)
        wait_for(lambda: "round 2/4 step" in disturbed.output())
        pids = descendants(process.pid)
        if victim == "site":
            os.kill(process_of(pids, "B"), signal.SIGKILL)
            time.sleep(2)
        else:
            os.kill(process.pid, signal.SIGKILL)
            for pid in pids[1:]:
                os.kill(pid, signal.SIGKILL)
    finally:
        stop(process)
    before = finished_rounds(disturbed.home)
    assert 1 <= before < 4

    run = disturbed.run(FLAP_RESUME="last")
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    for name in ("adapter_last", "adapter_best", "server_4"):
        assert sha256(run, name) == sha256(undisturbed, name)


def test_a_run_that_does_not_exist_is_named(simulation: Callable) -> None:
    first = simulation("first", changes=SETTINGS, sites=("A",))
    process = first.start(FLAP_RESUME="20200101-000000")
    process.wait(120)
    assert "FLAP_RESUME=20200101-000000: no such run" in first.output()
    assert not list(first.home.glob("runs/fed_kits/*"))
