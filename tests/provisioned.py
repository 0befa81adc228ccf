"""A provisioned federation on loopback: certificates, start-up kits, one process tree a member."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from typing import Any

import yaml

JOB = Path(__file__).parents[1] / "jobs" / "fed_kits"
ADMIN = "admin@hospital.org"
SERVER = "localhost"
PROJECT = "hospitals"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float, what: str, period: float = 0.2) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds} s still not so: {what}"
        time.sleep(period)


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, SIGKILL)
        except ProcessLookupError:
            continue


@dataclass
class Provisioned:
    """Kits of a server, sites and an administrator, made by `nvflare provision` in `folder`.

    Attributes:
        folder: everything lies in it, the home folder of all processes included.
        sites: names of the sites.
        settings: changes to the job's federation.yaml.
        site_file: changes to every site's flap_site.yaml.
        data_root: the scans; each site may have its own under `data_of`.
        environment: further variables of all processes.
        relay: name of a relay that all sites connect to in place of the server; none if empty.
        relay_port: where it listens.
    """

    folder: Path
    sites: Sequence[str] = ("A", "B", "C")
    settings: Mapping[str, Any] = field(default_factory=dict)
    site_file: Mapping[str, Any] = field(default_factory=dict)
    data_root: Path | None = None
    data_of: dict[str, Path] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    builders: Sequence[Mapping[str, Any]] = ()
    relay: str = ""
    relay_port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    # ---- kits ------------------------------------------------------------------------------
    @property
    def kits(self) -> Path:
        return self.folder / "work" / PROJECT / "prod_00"

    @property
    def members(self) -> tuple[str, ...]:
        return (SERVER, *self._relays, *self.sites)

    @property
    def _relays(self) -> tuple[str, ...]:
        return (self.relay,) if self.relay else ()

    def project(self) -> dict[str, Any]:
        """What goes into project.yml."""
        lighter, port = "nvflare.lighter.impl", free_port()
        organisation = {"org": "hospital"}
        # Without connection_security FLARE 2.9 leaves what passes between relay and sites in clear.
        security = {"connection_security": "mtls"}
        listens = {"scheme": "tcp", "default_host": SERVER, "port": self.relay_port, **security}
        through = {"connect_to": {"name": self.relay}} if self.relay else {}
        return {
            "api_version": 3,
            "name": PROJECT,
            "description": "hospitals on loopback",
            "participants": [
                {
                    "name": SERVER,
                    "type": "server",
                    "fed_learn_port": port,
                    "admin_port": port,
                    "default_host": SERVER,
                    **organisation,
                },
                *(
                    {"name": relay, "type": "relay", "listening_host": listens, **organisation}
                    for relay in self._relays
                ),
                *(
                    {"name": site, "type": "client", **through, **organisation}
                    for site in self.sites
                ),
                {"name": ADMIN, "type": "admin", "role": "project_admin", **organisation},
            ],
            "builders": [
                {
                    "path": f"{lighter}.workspace.WorkspaceBuilder",
                    "args": {"template_file": "master_template.yml"},
                },
                {
                    "path": f"{lighter}.static_file.StaticFileBuilder",
                    "args": {"config_folder": "config", "scheme": "tcp"},
                },
                {"path": f"{lighter}.cert.CertBuilder"},
                *self.builders,
                {"path": f"{lighter}.signature.SignatureBuilder"},
            ],
        }

    def provision(self) -> None:
        """Makes the kits and lays the overlay over those of the server and the sites."""
        path = self.folder / "project.yml"
        path.write_text(yaml.safe_dump(self.project(), sort_keys=False), encoding="utf-8")
        self.command("nvflare", "provision", "-p", path, "-w", self.folder / "work")
        assert self.kits.is_dir()
        for name in (SERVER, *self.sites):  # a relay runs no job
            self.command("flap-nvflare", "site", "init", self.kits / name)
            if name != SERVER:
                root = self.data_of.get(name, self.data_root)
                self.change_site_file(name, data_root=str(root), **self.site_file)

    def change_site_file(self, site: str, **values: Any) -> None:
        path = self.kits / site / "local" / "flap_site.yaml"
        known = yaml.safe_load(path.read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump({**known, **values}), encoding="utf-8")

    def command(self, name: str, *arguments: Any, timeout: float = 300) -> str:
        """Runs a command of this environment; fails with its output."""
        program = [str(Path(sys.executable).parent / name)]
        if name == "flap-nvflare":  # of the package that is tested, installed or not
            program = [sys.executable, "-m", "flap_nvflare.cli"]
        done = subprocess.run(
            [*program, *map(str, arguments)],
            env=self.variables(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{name} {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    # ---- processes -------------------------------------------------------------------------
    def variables(self, member: str = "") -> dict[str, str]:
        """The environment of a member's processes: a home of its own, nothing of the tester's."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("FLAP_", "NVFLARE"))}
        home = self.folder / "homes" / (member or "admin")
        home.mkdir(parents=True, exist_ok=True)
        return {
            **own,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **self.environment,
        }

    def start(self, *names: str) -> None:
        """Starts members by their kits' scripts, all of them if none is named."""
        for name in names or self.members:
            log = self.log_path(name).open("a")
            self.running[name] = subprocess.Popen(
                ["bash", str(self.kits / name / "startup" / "sub_start.sh")],
                env=self.variables(name),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def pids(self, name: str, word: str = "") -> list[int]:
        """Processes of a member that have the word in their command lines; all, for no word.

        By the kit's path in the command line, so that orphans are found as well.
        """
        found = []
        kit = str(self.kits / name)
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = line.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if (kit + " " in text or kit + "/" in text) and word in text:
                found.append(int(line.parent.name))
        return found

    def job_processes(self, name: str) -> list[int]:
        """The processes in which a member runs jobs: FLARE's workers."""
        return self.pids(name, "worker_process") or self.pids(name, "runner_process")

    def kill(self, name: str) -> None:
        """Ends all processes of a member, the watchdog too, as a power cut does."""
        kill(self.pids(name))
        if name in self.running:
            self.running.pop(name).wait(30)
        for left in ("daemon_pid.fl", "pid.fl"):
            (self.kits / name / left).unlink(missing_ok=True)

    def stop(self) -> None:
        for name in self.members:
            self.kill(name)

    def log_path(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def log(self, name: str) -> str:
        path = self.log_path(name)
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def logs(self, last: int = 3000) -> str:
        """The ends of all logs, for a test that fails."""
        return "\n".join(f"==== {name}\n{self.log(name)[-last:]}" for name in self.members)

    # ---- jobs ------------------------------------------------------------------------------
    def job(self) -> Path:
        """The job; a copy with changed settings if there are changes."""
        if not self.settings:
            return JOB
        job = self.folder / "jobs" / "fed_kits"
        if not job.exists():
            shutil.copytree(JOB, job)
        path = job / "app" / "config" / "federation.yaml"
        known = yaml.safe_load((JOB / "app" / "config" / path.name).read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump({**known, **self.settings}), encoding="utf-8")
        return job

    def session(self, seconds: float = 90, sites: int | None = None) -> Any:
        """An administrator's session once the server and so many sites are up."""
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        os.environ["HOME"] = self.variables()["HOME"]  # FLARE writes there
        wanted = len(self.sites) if sites is None else sites
        end, session = time.monotonic() + seconds, None
        while True:
            try:
                session = session or new_secure_session(ADMIN, str(self.kits / ADMIN))
                if len(session.get_system_info().client_info) >= wanted:
                    return session
            except Exception:  # not up yet; FLARE's errors have several types
                session = None
            assert time.monotonic() < end, f"not up after {seconds} s\n{self.logs()}"
            time.sleep(0.5)

    def submit(self, session: Any, job: Path | None = None) -> str:
        return str(session.submit_job(str(job or self.job())))

    def status(self, session: Any, job_id: str) -> str:
        return str(session.get_job_meta(job_id).get("status"))

    def wait(self, session: Any, job_id: str, seconds: float = 240) -> str:
        """The status of the finished job."""
        wait_for(
            lambda: self.status(session, job_id).startswith("FINISHED"),
            seconds,
            f"job {job_id} has finished\n{self.logs()}",
            period=0.5,
        )
        return self.status(session, job_id)

    def runs(self) -> list[Path]:
        """Folders of the server's runs, oldest first."""
        found = (self.folder / "homes" / SERVER).rglob("run.json")
        kept = (self.kits / SERVER / "flap").rglob("run.json")
        return sorted({path.parent for path in (*found, *kept)})

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of the last run."""
        path = self.runs()[-1] / "rounds.jsonl" if self.runs() else None
        if path is None or not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if re.fullmatch(r"\{.*\}", line)]
