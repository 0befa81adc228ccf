"""The bench of many sites: its job, what it reads from a run, and how it watches memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flap_nvflare.bench.scale import SETTINGS, ScaleFigures, main, make_job, results, table_line
from flap_nvflare.bench.watch import Peaks, StoppedError, sample, watch

JOB = Path(__file__).parents[2] / "jobs" / "fed_kits"
# A site's process by its command line, which holds the words of FLARE's.
SITE = "nvflare.private.fed.app.simulator.simulator_worker"


def test_the_job_is_for_other_sites_and_keeps_the_rest(tmp_path: Path) -> None:
    copy = make_job(JOB, tmp_path, ["S001", "S002"], {"rounds": 7})
    assert copy.name == JOB.name
    meta = json.loads((copy / "meta.json").read_text())
    assert meta["deploy_map"] == {"app": ["server", "S001", "S002"], "simulator": []}
    settings = yaml.safe_load((copy / "app" / "config" / "federation.yaml").read_text())
    assert settings["rounds"] == 7
    assert settings["rule"] == "svd"


def _line(index: int, sites: dict[str, int], seconds: float) -> dict[str, Any]:
    return {
        "round": index,
        "seconds": seconds,
        "taking_part": ["A", "B", "C"],
        "sites": {name: {} for name in sites},
        "bytes": {name: {"up": count, "down": 2 * count} for name, count in sites.items()},
    }


def _run(home: Path) -> None:
    folder = home / "flap" / "runs" / "fed_kits" / "now"
    folder.mkdir(parents=True)
    lines = [_line(0, {"A": 10, "B": 20, "C": 30}, 4.0), _line(1, {"A": 11, "B": 21}, 3.0)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {
        "A": {"dice": {"kidney": 0.5, "tumour": None, "mean": 0.5}},
        "B": {"dice": {"kidney": 0.7, "tumour": 0.2, "mean": 0.45}},
    }
    (folder / "cross_site.json").write_text(json.dumps({"last": scores}))
    (home / "output.txt").write_text(
        "2026-01-01 10:00:00,000 - INFO - all is well\n"
        "2026-01-01 10:00:01,000 - ERROR - round 1: no answer from C\n"
        "2026-01-01 10:00:01,000 - FlapController - ERROR - no scores from site C\n"
    )


def test_a_run_is_read_from_its_own_files(tmp_path: Path) -> None:
    _run(tmp_path)
    assert results(tmp_path) == {
        "round_seconds": (4.0, 3.0),
        "bytes_up": (60, 32),
        "bytes_down": (120, 64),
        "dice": {"kidney": 0.6, "mean": 0.475, "tumour": 0.2},
        "scored": 2,
        "lost": 1,
        "errors": ("round 1: no answer from C", "no scores from site C"),
    }


def test_a_row_has_a_rounds_bytes_and_the_largest_memory(tmp_path: Path) -> None:
    _run(tmp_path)
    one = ScaleFigures(
        sites=3,
        threads=2,
        forked=True,
        settings=SETTINGS,
        seconds=9.4,
        cpu_seconds=12.6,
        peaks=(Peaks(0, 5_000_000, 7_000_000, 2, 0), Peaks(1, 6_000_000, 4_000_000, 3, 0)),
        versions={},
        **{**results(tmp_path), "bytes_up": (1_000_000, 3_000_000), "bytes_down": (4_000_000,)},
    )
    cells = [cell.strip() for cell in table_line(one).strip("|").split("|")]
    assert cells == [
        "3", "2", "forked", "2", "4, 3", "9", "13", "2.0", "4.0", "6.0", "7.0", "3", "47.5", "1, 2"
    ]  # fmt: skip


def _python(code: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE)


def test_memory_of_sites_is_told_from_that_of_the_server() -> None:
    held = "held = bytearray(b'1' * {}); print('.', flush=True); import time; time.sleep(60)"
    code = (
        "import subprocess, sys\n"
        f"site = subprocess.Popen([sys.executable, '-c', {held.format(40_000_000)!r}, {SITE!r}],"
        " stdout=subprocess.PIPE)\n"
        "site.stdout.read(1)\n" + held.format(90_000_000)
    )
    process = _python(code)
    try:
        assert process.stdout is not None
        process.stdout.read(1)
        found = sample(psutil.Process(process.pid), 5)
    finally:
        for one in (*psutil.Process(process.pid).children(), process):
            one.kill()
        process.wait()
    assert (found.round, found.processes) == (5, 1)
    assert 90e6 < found.server < 120e6
    assert 40e6 < found.sites == found.site < 70e6


def test_peaks_are_kept_by_round() -> None:
    # The rounds count up with the looks, of which there are two in this time at least.
    process, looks = _python("import time; time.sleep(1.5)"), iter(range(100))
    found = watch(process, lambda: next(looks), seconds=30)
    assert [peaks.round for peaks in found][:2] == [0, 1]
    assert all(peaks.server > 1e6 and not peaks.processes for peaks in found[:1])


def test_what_takes_too_long_or_too_much_is_ended_with_all_its_processes() -> None:
    code = (
        "import subprocess, sys, time\n"
        "site = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " start_new_session=True)\n"
        "print(site.pid, flush=True)\n"
        "time.sleep(60)"
    )
    for limits, why in (({"seconds": 0.0}, "not done"), ({"seconds": 9.0, "spare": 1e15}, "free")):
        process = _python(code)
        assert process.stdout is not None
        site = int(process.stdout.readline())
        with pytest.raises(StoppedError, match=why):
            watch(process, lambda: 0, **limits)
        assert process.poll() is not None
        end = time.monotonic() + 10
        while psutil.pid_exists(site) and psutil.Process(site).status() != "zombie":
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_bad_setting_is_one_line_and_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.listdir(tmp_path)  # noqa: PTH208
    arguments = [str(JOB), "--sites", "2", "--set", "rounds=none", "--folder", str(tmp_path)]
    assert main(arguments) == 1
    assert "scale: setting rounds: 'none'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == before  # noqa: PTH208
