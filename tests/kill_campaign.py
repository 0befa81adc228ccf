"""Kills members of a provisioned federation at random times, and looks at what is left of the run.

    python tests/kill_campaign.py --kills 100 --seed 0 --out kills.jsonl

A federation of a server and three sites stays up over many runs of the same job. In every run some
processes are killed (SIGKILL): a site's job process, a whole site, the server's job process, the
whole server. Each kill is mended as the page for hospital IT has it and not otherwise: a killed
member is started by its own script, and after a kill at the server the same job is submitted
again. Every run must end with the bytes of an undisturbed one. One JSON line a kill, one a run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from provisioned import SERVER, Provisioned, kill

SITE_PROCESS, SITE, SERVER_PROCESS, WHOLE_SERVER = (
    "site process",
    "site",
    "server process",
    "server",
)
KINDS = (SITE_PROCESS, SITE, SERVER_PROCESS, WHOLE_SERVER)
SETTINGS = {"rounds": 8, "image_size": 32, "base": "random", "rank": 2, "batch_size": 16}
RESTARTS = 3  # of one site in one job, as local/resources.json of the overlay has it
ADAPTERS = ("adapter_last", "adapter_best")


class LostError(Exception):
    """What should have come back did not."""


def provisioned(
    folder: Path,
    settings: Mapping[str, Any] = SETTINGS,
    sites: Sequence[str] = ("A", "B", "C"),
    own_process: str = "off",
) -> Provisioned:
    """Kits of a server and sites with the demo's scans, not yet started."""
    from flap_nvflare.data.phantom import write_phantom

    federation = Provisioned(
        folder,
        sites=sites,
        settings=dict(settings),
        data_root=write_phantom(folder / "scans", seed=0, sites=list(sites)),
        site_file={"own_process": own_process},
        environment={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""},
    )
    federation.provision()
    return federation


def saved_rounds(run: Path | None) -> int:
    """Rounds that the run's last adapter has behind it, as its own file says."""
    path = None if run is None else run / "adapter_last.safetensors"
    if path is None or not path.is_file():
        return 0
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))["__metadata__"]["flap_spec"]
    return int(json.loads(header)["extra"]["rounds"])


@dataclass
class Campaign:
    """One federation, killed again and again.

    Attributes:
        federation: the members; `start` brings them up.
        draw: everything random of the campaign.
        write: takes the records, one for each kill and one for each run.
        spread: a kill follows the end of a round, or the last mend, within these seconds.
        patience: seconds that anything may take to come back.
    """

    federation: Provisioned
    draw: random.Random
    write: Callable[[dict[str, Any]], None]
    spread: float = 4.0
    patience: float = 180.0
    wanted: dict[str, str] = field(default_factory=dict)
    session: Any = None
    job: str = ""
    jobs: list[str] = field(default_factory=list)
    kills: list[dict[str, Any]] = field(default_factory=list)
    said: str = ""
    asked: float = 0.0
    earlier: list[Path] = field(default_factory=list)

    # ---- what is there ---------------------------------------------------------------------
    @property
    def rounds(self) -> int:
        return int(self.federation.settings["rounds"])

    @property
    def newest(self) -> Path | None:
        """The folder of this run; that of an earlier one is none of its."""
        found = [path for path in self.federation.runs() if path not in self.earlier]
        return found[-1] if found else None

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the newest run's adapters."""
        run = self.newest
        return {
            name: hashlib.sha256((run / f"{name}.safetensors").read_bytes()).hexdigest()
            for name in ADAPTERS
            if run is not None and (run / f"{name}.safetensors").is_file()
        }

    def status(self) -> str:
        return self.federation.status(self.session, self.job)

    def until(self, condition: Callable[[], Any], what: str, seconds: float | None = None) -> None:
        """Waits, and takes down when rounds end."""
        end = time.monotonic() + (seconds or self.patience)
        while not condition():
            if time.monotonic() > end:
                raise LostError(f"after {seconds or self.patience:g} s still not so: {what}")
            self.look()
            time.sleep(0.1)

    def look(self) -> None:
        """Notes the kills after which a round has ended, or the whole run."""
        done, now = saved_rounds(self.newest), time.monotonic()
        for one in self.kills:
            if "seconds" not in one and done > one["saved_before"]:
                one["seconds"] = round(now - one["at"], 2)
            if "seconds" not in one and one["kind"] in (SERVER_PROCESS, WHOLE_SERVER):
                one["saved_least"] = min(done, one["saved_least"])

    # ---- runs ------------------------------------------------------------------------------
    def undisturbed(self) -> float:
        """Runs the job once without a kill; its bytes are those of every other run."""
        started = time.monotonic()
        self.session = self.federation.session()
        self.submit()
        self.finish()
        self.wanted = self.hashes()
        if len(self.wanted) != len(ADAPTERS) or saved_rounds(self.newest) != self.rounds:
            raise LostError(f"the undisturbed run is not whole\n{self.federation.logs()}")
        return time.monotonic() - started

    def submit(self) -> None:
        self.job = self.federation.submit(self.session)
        self.jobs.append(self.job)
        self.said = ""

    def finish(self) -> str:
        """The job's status at its end."""
        self.until(self.ended, "the job has finished")
        return self.said

    def ended(self) -> bool:
        """Whether the job has; an administrator does not ask all the time."""
        if time.monotonic() - self.asked > 0.5:
            self.said, self.asked = self.status(), time.monotonic()
        return self.said.startswith("FINISHED")

    def run(self, index: int, kinds: Sequence[str]) -> dict[str, Any]:
        """One run with these kills, in this order; its record, written as well."""
        self.kills, self.jobs, problems = [], [], []
        self.earlier = self.federation.runs()
        started, status = time.monotonic(), ""
        try:
            self.submit()
            for kind in kinds:
                self.random_moment()
                if not self.strike(index, kind):
                    break
            status = self.finish()
            self.look()
            problems += self.faults(status)
        except Exception as error:  # the next run may show more
            said = f"{type(error).__name__}: {error}"
            problems.append(said if isinstance(error, LostError) else traceback.format_exc())
        problems += self.left_over()
        record = {
            "run": index,
            "status": status,
            "jobs": len(self.jobs),
            "kills": [one["kind"] for one in self.kills],
            "equal": bool(self.wanted) and self.hashes() == self.wanted,
            "seconds": round(time.monotonic() - started, 1),
            "problems": problems,
        }
        for one in self.kills:
            self.write({name: value for name, value in one.items() if name != "at"})
        self.write(record)
        return record

    def random_moment(self) -> None:
        """Waits for none, one or two more rounds and then some seconds.

        Seconds alone would not do: on a busy machine all kills would hit processes that come up.
        """
        goal = min(saved_rounds(self.newest) + self.draw.choice((0, 1, 1, 2)), self.rounds)
        self.until(
            lambda: saved_rounds(self.newest) >= goal or self.ended(), f"{goal} rounds have ended"
        )
        self.until_later(self.draw.uniform(0.0, self.spread))

    def until_later(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, "time goes on", seconds + 10)

    def faults(self, status: str) -> list[str]:
        """What is wrong with a run that has ended."""
        found = [] if status == "FINISHED:COMPLETED" else [f"status {status}"]
        lines = self.federation.rounds()
        order = [line["round"] for line in lines]
        if order != list(range(self.rounds)):
            found.append(f"rounds.jsonl has rounds {order}")
        for line in lines:
            if sorted(line["sites"]) != sorted(self.federation.sites):
                found.append(f"round {line['round']} counts {sorted(line['sites'])}")
        for name, value in self.hashes().items():
            if value != self.wanted[name]:
                found.append(f"{name} has other bytes")
        for one in self.kills:
            if one["saved_least"] < one["saved_before"]:
                found.append(f"{one['kind']}: finished rounds were lost")
        return found

    def left_over(self) -> list[str]:
        """Jobs that still run, and processes of jobs that have ended."""
        found: list[str] = []
        members = self.federation.members
        try:
            self.until(
                lambda: not any(self.federation.job_processes(name) for name in members),
                "no process of a job is left",
                45.0,
            )
        except LostError:
            left = {name: len(self.federation.job_processes(name)) for name in members}
            found.append(f"processes left {left}")
        try:
            stuck = [
                f"job {job['job_id'][:8]} left {job['status']}"
                for job in self.session.list_jobs()
                if not str(job["status"]).startswith("FINISHED")
            ]
            found += stuck
        except Exception as error:
            found.append(f"jobs can't be listed: {type(error).__name__}: {error}")
        return found

    # ---- kills -----------------------------------------------------------------------------
    def strike(self, index: int, kind: str) -> bool:
        """Kills one, mends it; False if the job had ended before."""
        member = SERVER
        if kind in (SITE, SITE_PROCESS):
            of_job = [one for one in self.kills if one["job"] == len(self.jobs)]
            struck = [one["member"] for one in of_job if one["kind"] == kind]
            free = [name for name in self.federation.sites if struck.count(name) < RESTARTS]
            member = self.draw.choice(free)
        self.until(
            lambda: self.ended() or self.federation.job_processes(member), f"{member} runs the job"
        )
        if self.ended():
            return False
        one = {
            "run": index,
            "kind": kind,
            "member": member,
            "job": len(self.jobs),
            "saved_before": saved_rounds(self.newest),
            "saved_least": saved_rounds(self.newest),
            "at": time.monotonic(),
        }
        self.kills.append(one)
        {
            SITE_PROCESS: self.kill_process,
            SITE: self.kill_member,
            SERVER_PROCESS: self.kill_process,
            WHOLE_SERVER: self.kill_member,
        }[kind](member, one)
        if member == SERVER:
            self.submit_again()
        one["mended"] = round(time.monotonic() - one["at"], 2)
        return True

    def kill_process(self, member: str, one: dict[str, Any]) -> None:
        kill(self.federation.job_processes(member))

    def kill_member(self, member: str, one: dict[str, Any]) -> None:
        self.federation.kill(member)
        away = self.draw.uniform(1.0, 10.0)
        one["away"] = round(away, 1)
        self.until_later(away)
        self.federation.start(member)
        if member == SERVER:
            self.session = self.federation.session(self.patience)

    def submit_again(self) -> None:
        """The mend of a kill at the server, once it says that the job has ended."""
        said = self.finish()
        self.kills[-1]["said"] = said
        if said == "FINISHED:COMPLETED":
            raise LostError("a job whose server was killed says that it is complete")
        self.submit()


def repair(campaign: Campaign) -> None:
    """After a run that failed: all members anew, no run left to go on with."""
    federation = campaign.federation
    federation.stop()
    for path in federation.runs():
        path.rename(path.with_name(f"{path.name}-failed"))
        (path.with_name(f"{path.name}-failed") / "run.json").unlink()
    federation.start()
    campaign.session = federation.session(campaign.patience)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the campaign; exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--each", type=int, default=4, help="kills in one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=4.0)
    parser.add_argument("--minutes", type=float, default=600.0, help="no run starts after these")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="a folder that is kept, for the logs")
    given = parser.parse_args(arguments)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kills_"))
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes

    def write(record: dict[str, Any]) -> None:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    draw = random.Random(given.seed)
    campaign = Campaign(provisioned(folder), draw, write, spread=given.spread)
    done = failed = index = 0
    try:
        campaign.federation.start()
        write({"undisturbed": round(campaign.undisturbed(), 1), "settings": SETTINGS})
        while done < given.kills and time.monotonic() < end:
            kinds = [KINDS[(done + step) % len(KINDS)] for step in range(given.each)]
            draw.shuffle(kinds)
            record = campaign.run(index, kinds)
            done, index = done + len(record["kills"]), index + 1
            if record["problems"]:
                failed += 1
                repair(campaign)
    finally:
        campaign.federation.stop()
    print(f"{done} kills in {index} runs, {failed} runs failed; {given.out}")
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # the administrator's connections keep threads of their own


if __name__ == "__main__":
    main()
