"""The page for hospital IT: its commands lead from an empty folder to a finished federation."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from page import INSTALL, Shell, commands, environment, processes_in
from provisioned import wait_for
from safetensors.torch import load_file

from flap_nvflare.site.audit_log import audit_path, read_lines
from flap_nvflare.site.audit_summary import summary

SITES = ("A", "B", "C")


def test_the_page_has_at_most_fifteen_commands() -> None:
    found = commands()
    assert 10 <= len(found) <= 15
    assert sum(INSTALL in one for one in found) == 1
    assert INSTALL in found[0]


@pytest.mark.provisioned
@pytest.mark.timeout(900)
def test_the_page_from_an_empty_folder_to_the_bytes_of_the_simulator(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    try:
        # The environment that runs this test stands for the one that the first command makes.
        shell.type(["true", *commands()[1:]], 500)
        the_doctor_found_nothing_to_mend(shell)
        the_result_is_whole_and_every_round_counts_three_sites(shell)
        the_audit_is_whole_and_nothing_but_the_adapter_left(shell)
        wait_for(lambda: not processes_in(shell.place), 60, "all processes of the kits have ended")
    finally:
        shell.end()
    the_simulator_gives_the_same_bytes(shell)


def result(shell: Shell) -> Path:
    (found,) = (shell.place / "result").glob("*/workspace/flap")
    return found


def kit(shell: Shell, site: str) -> Path:
    return shell.place / "federation" / "hospitals" / "prod_00" / site


def the_result_is_whole_and_every_round_counts_three_sites(shell: Shell) -> None:
    folder = result(shell)
    for name in ("adapter_last.safetensors", "adapter_best.safetensors", "run.json"):
        assert (folder / name).stat().st_size > 0
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert all(set(line["sites"]) == set(SITES) and not line["refused"] for line in lines)
    matrix = json.loads((folder / "cross_site.json").read_text())
    assert {"last", "best"} <= set(matrix)
    assert all(set(row) == set(SITES) for row in matrix.values())
    assert json.loads((folder / "run.json").read_text())["data"] == "synthetic"


def the_doctor_found_nothing_to_mend(shell: Shell) -> None:
    (said,) = (
        text
        for line, text in zip(commands(), shell.said, strict=True)
        if "flap-nvflare doctor" in line
    )
    assert said.count(", 0 fail, ") == len(SITES), said


def the_audit_is_whole_and_nothing_but_the_adapter_left(shell: Shell) -> None:
    allowed = set(load_file(result(shell) / "adapter_last.safetensors"))
    for site in SITES:
        found = summary(kit(shell, site))
        (job,) = found.jobs
        assert found.intact
        assert not found.unreadable
        assert (job.sent, job.errors, job.blocked, job.refused) == (4, 0, 0, 0)
        assert job.tensors == allowed
        assert audit_path(kit(shell, site)).stat().st_mode & 0o777 == 0o600
        assert all(values is not None for _, values in read_lines(found.path))


def the_simulator_gives_the_same_bytes(shell: Shell) -> None:
    home = shell.folder / "simulated"
    variables = {
        **environment(shell.folder),
        "FLAP_HOME": str(home),
        "FLAP_DATA_ROOT": str(shell.place / "scans"),
    }
    command = "nvflare simulator flap_nvflare/jobs/fed_kits -c A,B,C -t 3 -w ../simulator"
    done = subprocess.run(
        command.split(),
        cwd=shell.place,
        env=variables,
        capture_output=True,
        text=True,
        timeout=400,
    )
    runs = list((home / "runs" / "fed_kits").iterdir())
    assert len(runs) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("adapter_last.safetensors", "adapter_best.safetensors"):
        assert (runs[0] / name).read_bytes() == (result(shell) / name).read_bytes(), name
