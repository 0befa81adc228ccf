"""Startup kits as FLARE's provisioning lays them out, with no more in them than a test reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OWN = ["nvflare.app_common.workflows.fedavg.FedAvg"]
RIGHTS = {"view": "any", "shell_commands": "o:site", "byoc": "any"}
COMPONENTS = [
    {"id": "process_launcher", "path": "nvflare.x.Launcher", "args": {}},
    {"id": "site_log_streamer", "path": "nvflare.x.SiteLogStreamer"},
]
SERVER_COMPONENTS = [
    {"id": "job_scheduler", "path": "nvflare.x.Scheduler", "args": {"max_jobs": 4}},
    {
        "id": "job_manager",
        "path": "nvflare.x.Jobs",
        "args": {"uri_root": "/tmp/nvflare/jobs-storage", "job_store_id": "job_store"},
    },
]
SNAPSHOTS = {
    "path": "nvflare.x.Persistor",
    "args": {"storage": {"path": "nvflare.x.Storage", "args": {"root_dir": "/tmp/nvflare"}}},
}


def write_kit(folder: Path, kind: str = "client") -> Path:
    """A kit of a `client`, a `server` or an `admin`."""
    for name in ("startup", "local"):
        (folder / name).mkdir(parents=True)
    service = {"target": "server.org:8002", "scheme": "grpc"}
    keys = {"ssl_private_key": "own.key", "ssl_cert": "own.crt", "ssl_root_cert": "rootCA.pem"}
    values: dict[str, Any] = {
        "servers": [{"name": "p", "service": service, "identity": "server.org"}],
        "client": {**keys, "fqsn": "A", "connection_security": "mtls"},
    }
    if kind == "server":
        values["servers"][0].update(keys)
    _write(folder / "startup" / f"fed_{kind}.json", values)
    resources: dict[str, Any] = {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": OWN,
        "components": SERVER_COMPONENTS if kind == "server" else COMPONENTS,
    }
    if kind == "server":
        resources["snapshot_persistor"] = SNAPSHOTS
    _write(folder / "local" / "resources.json.default", resources)
    permissions = {"project_admin": "any", "lead": RIGHTS, "member": {"view": "any"}}
    authorization = {"format_version": "1.0", "permissions": permissions}
    _write(folder / "local" / "authorization.json.default", authorization)
    return folder


def local(kit: Path, name: str) -> Any:
    """A JSON file of the kit's folder `local`."""
    return json.loads((kit / "local" / name).read_text(encoding="utf-8"))


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")
