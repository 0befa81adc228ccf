"""The job folder, unchanged, in FLARE's POC on this machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from page import PORT, ROOT, environment, processes_in
from provisioned import free_port, kill, wait_for

from flap_nvflare.data.phantom import write_phantom
from flap_nvflare.site.audit_summary import summary

pytestmark = [pytest.mark.provisioned, pytest.mark.timeout(600)]
SITES = ("A", "B")


class Poc:
    """POC's workspace in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "poc"

    @property
    def kits(self) -> Path:
        return self.work / "hospitals" / "prod_00"

    def run(self, line: str) -> str:
        done = subprocess.run(
            line.split(),
            cwd=self.folder,
            env={**environment(self.folder), "NVFLARE_POC_WORKSPACE": str(self.work)},
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "out.txt").open("w"),  # no pipe: what it starts would hold it
            stderr=subprocess.STDOUT,
            timeout=400,
        )
        said = (self.folder / "out.txt").read_text(encoding="utf-8")
        assert done.returncode == 0, f"{line}: {said}"
        return said


@pytest.fixture
def poc(tmp_path: Path) -> Iterator[Poc]:
    one = Poc(tmp_path)
    text = (ROOT / "custom" / "project.yml").read_text(encoding="utf-8")
    project = yaml.safe_load(text.replace(PORT, str(free_port())))
    project["participants"] = [
        member for member in project["participants"] if member["name"] != "C"
    ]
    (tmp_path / "project.yml").write_text(yaml.safe_dump(project), encoding="utf-8")
    write_phantom(tmp_path / "scans", seed=0, sites=list(SITES))
    try:
        yield one
    finally:
        kill(processes_in(one.work))


def test_the_job_folder_runs_unchanged(poc: Poc) -> None:
    poc.run("nvflare poc prepare -i project.yml --force")
    poc.run(f"flap-nvflare site init {poc.kits}/localhost")
    for site in SITES:
        poc.run(f"flap-nvflare site init {poc.kits}/{site} --data-root scans")
    poc.run("nvflare poc start --timeout 90")
    said = poc.run(f"nvflare job submit -j {ROOT}/jobs/fed_kits")
    (job,) = (line.split()[1] for line in said.splitlines() if line.startswith("job_id: "))
    assert "FINISHED:COMPLETED" in poc.run(f"nvflare job monitor {job}")
    poc.run(f"nvflare job download {job} -o result")
    folder = poc.folder / "result" / job / "workspace" / "flap"
    assert (folder / "adapter_last.safetensors").stat().st_size > 0
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [set(line["sites"]) for line in lines] == [set(SITES)] * 3
    assert all(summary(poc.kits / site).intact for site in SITES)
    poc.run("nvflare poc stop")
    wait_for(lambda: not processes_in(poc.work), 60, "all processes of the kits have ended")
