"""A provisioned federation of two sites on loopback, each with a policy of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from processes import stop

from flap_nvflare.flare.recipe import allow_components

JOB = Path(__file__).parents[2] / "jobs" / "fed_kits"
HERE = Path(__file__).parent
SITES, ADMIN = ("A", "B"), "admin@o.org"
DP_SEED = "73104982"  # of the noise at the sites: a secret
SMALL = {
    "rounds": 2,
    "image_size": 64,
    "batch_size": 16,
    "local_epochs": 1,
    "cross_site": "global",
}


def component(path: str, **args: Any) -> dict[str, Any]:
    return {"id": path.rsplit(".", 1)[1], "path": path, "args": args}


class Gated:
    """Kits of a server, two sites and an administrator; `start`, `run` jobs, `stop`.

    Args:
        folder: where everything lies, the home of all processes as well.
        data: the scans.
        components: of each site's `privacy.json`.
        site_file: further lines of each site's `flap_site.yaml`.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        components: Sequence[Mapping[str, Any]],
        site_file: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.data = folder, data
        self.kits = self._provision()
        self._running: list[subprocess.Popen[str]] = []
        for name in ("localhost", *SITES):
            local = self.kits / name / "local"
            default = (local / "resources.json.default").read_text(encoding="utf-8")
            resources = default.replace("/tmp/nvflare", str(folder / "store"))
            (local / "resources.json").write_text(resources, encoding="utf-8")
            allow_components(local)
            if name in SITES:
                self._lay(local, components, site_file or {})

    def _lay(
        self, local: Path, components: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]
    ) -> None:
        scope = {"name": "site", "task_data_filters": [], "task_result_filters": []}
        policy = {"scopes": [scope], "default_scope": "site", "components": list(components)}
        (local / "privacy.json").write_text(json.dumps(policy), encoding="utf-8")
        own = {"data_root": str(self.data), "state_dir": str(local.parent / "flap" / "state")}
        (local / "flap_site.yaml").write_text(yaml.safe_dump({**own, **extra}), encoding="utf-8")

    def change_resources(self, site: str, **values: Any) -> None:
        path = self.kits / site / "local" / "resources.json"
        resources = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**resources, **values}), encoding="utf-8")

    def start(self) -> None:
        for name in ("localhost", *SITES):
            self._running.append(
                subprocess.Popen(
                    ["bash", str(self.kits / name / "startup" / "sub_start.sh")],
                    env=self._environment(name),
                    stdout=(self.folder / f"{name}.txt").open("w"),
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )

    def stop(self) -> None:
        for process in self._running:
            stop(process)

    def job(
        self,
        name: str,
        settings: Mapping[str, Any],
        filters: Sequence[str] = (),
        components: Sequence[str] = (),
    ) -> Path:
        """A job whose sites have more result filters at the end, and components."""
        job = self.folder / name
        shutil.copytree(JOB, job, ignore=shutil.ignore_patterns("custom"))
        path = job / "app" / "config" / "federation.yaml"
        known = yaml.safe_load(path.read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump({**known, **settings}), encoding="utf-8")
        path = job / "app" / "config" / "config_fed_client.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["task_result_filters"][0]["filters"] += [
            {"path": one, "args": {}} for one in filters
        ]
        config["components"] += [component(one) for one in components]
        path.write_text(json.dumps(config), encoding="utf-8")
        meta = json.loads((job / "meta.json").read_text(encoding="utf-8"))
        meta["deploy_map"] = {"app": ["server", *SITES]}
        (job / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        return job

    def run(self, job: Path, seconds: float = 150) -> str:
        """Runs the job to its end, however that is; its id."""
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        os.environ["HOME"] = str(self.folder)  # FLARE writes there
        session, end = None, time.monotonic() + seconds
        while session is None or len(session.get_system_info().client_info) < len(SITES):
            assert time.monotonic() < end, f"not up\n{self.logs()}"
            time.sleep(0.5)
            try:
                session = session or new_secure_session(ADMIN, str(self.kits / ADMIN))
            except Exception:  # the server is not up yet; its errors have several types
                session = None
        try:
            job_id = str(session.submit_job(str(job)))
            session.monitor_job(job_id, timeout=end - time.monotonic())
        finally:
            session.close()
        return job_id

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of the newest run."""
        runs = sorted((self.folder / "flap_localhost" / "runs").rglob("rounds.jsonl"))
        return [json.loads(line) for line in runs[-1].read_text().splitlines()] if runs else []

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace")

    def logs(self, last: int = 4000) -> str:
        return "\n".join(f"== {name}\n{self.log(name)[-last:]}" for name in ("localhost", *SITES))

    def _environment(self, name: str) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("FLAP_", "NVFLARE"))}
        return {
            **own,
            "HOME": str(self.folder),
            "FLAP_DP_SEED": DP_SEED,
            "FLAP_HOME": str(self.folder / f"flap_{name}"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
        }

    def _provision(self) -> Path:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = int(probe.getsockname()[1])
        lighter = "nvflare.lighter.impl"
        server = {"name": "localhost", "type": "server", "org": "o", "default_host": "localhost"}
        project = {
            "api_version": 3,
            "name": "gated",
            "description": "sites with a last gate",
            "participants": [
                {**server, "fed_learn_port": port, "admin_port": port},
                *({"name": name, "type": "client", "org": "o"} for name in SITES),
                {"name": ADMIN, "type": "admin", "org": "o", "role": "project_admin"},
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
                {"path": f"{lighter}.signature.SignatureBuilder"},
            ],
        }
        file = self.folder / "project.yml"
        file.write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
        command = [str(Path(sys.executable).parent / "nvflare"), "provision", "-p", str(file)]
        done = subprocess.run(
            [*command, "-w", str(self.folder / "work")],
            env={**os.environ, "HOME": str(self.folder)},
            capture_output=True,
            text=True,
        )
        kits = self.folder / "work" / "gated" / "prod_00"
        assert kits.is_dir(), done.stdout + done.stderr
        return kits
