"""Faults of a site in a provisioned federation: real certificates, processes and kills."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from signal import SIGKILL
from typing import Any

import pytest
from encryption_cases import SMALL
from provisioned import Provisioned, wait_for

from flap_nvflare.data.phantom import write_phantom

pytestmark = [pytest.mark.provisioned, pytest.mark.timeout(600)]

SITES = ("A", "B")
SETTINGS = {**SMALL, "rounds": 3, "local_epochs": 3, "min_sites": 1, "straggler_wait": 120}
JOB_PROCESS = "nvflare.private.fed.app.client.worker_process"
TRAINER = "flap_nvflare.bundle.own_process"


class Hospitals(Provisioned):
    """The federation with one session of its administrator."""

    session_of_admin: Any

    def run(self) -> str:
        """Submits the job, and returns its id once it has a folder of its own."""
        known = len(self.runs())
        job = self.submit(self.session_of_admin)
        wait_for(lambda: len(self.runs()) > known, 60, "the job has begun")
        return job

    def end_of(self, job: str) -> str:
        return self.wait(self.session_of_admin, job)

    def sha256(self) -> str:
        path = self.runs()[-1] / "adapter_last.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def reach_second_round(self) -> None:
        """Returns while site B trains the second round."""
        wait_for(lambda: len(self.rounds()) == 1, 120, "one round has ended")
        wait_for(lambda: bool(self.pids("B", TRAINER)), 60, "site B trains")
        time.sleep(1)

    def kill_one(self, module: str) -> int:
        """Kills the module's process of site B."""
        (pid,) = self.pids("B", module)
        os.kill(pid, SIGKILL)
        return pid


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    folder = tmp_path_factory.mktemp("faults")
    data = write_phantom(folder / "scans", seed=0, sites=list(SITES))
    hospitals = Hospitals(folder, sites=SITES, settings=SETTINGS, data_root=data)
    hospitals.provision()
    try:
        hospitals.start()
        hospitals.session_of_admin = hospitals.session()
        yield hospitals
        hospitals.session_of_admin.close()
    finally:
        hospitals.stop()


@pytest.fixture(scope="module")
def undisturbed(hospitals: Hospitals) -> str:
    """SHA-256 of the last adapter of a run to which nothing happened."""
    assert hospitals.end_of(hospitals.run()) == "FINISHED:COMPLETED"
    return hospitals.sha256()


def test_a_killed_job_process_comes_back_and_the_result_is_the_same(
    hospitals: Hospitals, undisturbed: str
) -> None:
    job = hospitals.run()
    hospitals.reach_second_round()
    killed = hospitals.kill_one(JOB_PROCESS)
    wait_for(lambda: len(hospitals.pids("B", JOB_PROCESS)) == 1, 30, "it is started again")
    assert hospitals.pids("B", JOB_PROCESS) != [killed]
    assert hospitals.end_of(job) == "FINISHED:COMPLETED"
    assert [set(line["sites"]) for line in hospitals.rounds()] == [{"A", "B"}] * 3
    assert hospitals.sha256() == undisturbed
    assert "was killed by signal 9; started again in 2 s" in hospitals.log("B")


def test_a_site_that_was_cut_off_goes_on_with_the_job_and_the_result_is_the_same(
    hospitals: Hospitals, undisturbed: str
) -> None:
    job = hospitals.run()
    hospitals.reach_second_round()
    hospitals.kill("B")
    assert not hospitals.pids("B", JOB_PROCESS)
    time.sleep(5)
    hospitals.start("B")
    assert hospitals.end_of(job) == "FINISHED:COMPLETED"
    assert [set(line["sites"]) for line in hospitals.rounds()] == [{"A", "B"}] * 3
    assert hospitals.sha256() == undisturbed
    assert not list((hospitals.kits / "B").rglob("flap_running.json"))


def test_a_killed_trainer_costs_one_round_of_one_site(hospitals: Hospitals) -> None:
    job = hospitals.run()
    hospitals.reach_second_round()
    hospitals.kill_one(TRAINER)
    assert hospitals.end_of(job) == "FINISHED:COMPLETED"
    taking_part = [set(line["sites"]) for line in hospitals.rounds()]
    assert taking_part == [{"A", "B"}, {"A"}, {"A", "B"}]
    said = "round 1: site B lost the process that trained (exit code -9;"
    assert said in hospitals.log("localhost")
    assert not hospitals.pids("B", TRAINER)
    assert not list((hospitals.kits / "B" / "flap").rglob("round_*"))


def test_an_aborted_job_is_not_started_again(hospitals: Hospitals) -> None:
    job = hospitals.run()
    wait_for(lambda: bool(hospitals.pids("B", TRAINER)), 60, "site B trains")
    hospitals.session_of_admin.abort_job(job)
    assert hospitals.end_of(job) == "FINISHED:ABORTED"
    wait_for(lambda: not hospitals.pids("B", JOB_PROCESS), 30, "the job has ended")
    time.sleep(5)
    assert not hospitals.pids("B", JOB_PROCESS)
    assert not hospitals.pids("B", TRAINER)
