"""Startup kits by FLARE's own provisioning, and a federation of them on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

ADMIN = "admin@o.org"
SERVER = "localhost"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def provision(folder: Path, sites: Sequence[str] = ("A",)) -> Path:
    """The folder of the kits of a server, the sites and an administrator."""
    port = free_port()
    lighter = "nvflare.lighter.impl"
    server = {"name": SERVER, "type": "server", "org": "o", "default_host": "localhost"}
    project = {
        "api_version": 3,
        "name": "hospitals",
        "description": "a federation on one machine",
        "participants": [
            {**server, "fed_learn_port": port, "admin_port": port},
            *({"name": name, "type": "client", "org": "o"} for name in sites),
            {"name": ADMIN, "type": "admin", "org": "o", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{lighter}.workspace.WorkspaceBuilder", "args": {}},
            {
                "path": f"{lighter}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "tcp"},
            },
            {"path": f"{lighter}.cert.CertBuilder"},
            {"path": f"{lighter}.signature.SignatureBuilder"},
        ],
    }
    (folder / "project.yml").write_text(yaml.safe_dump(project, sort_keys=False))
    command = [Path(sys.executable).parent / "nvflare", "provision", "-p", folder / "project.yml"]
    found = subprocess.run(
        [*command, "-w", folder / "work"],
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    kits = folder / "work" / "hospitals" / "prod_00"
    assert kits.is_dir(), found.stdout + found.stderr
    return kits


def start(kit: Path, home: Path) -> subprocess.Popen[str]:
    """FLARE's process of a kit, in a session of its own; end it with `processes.stop`."""
    home.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        ["bash", str(kit / "startup" / "sub_start.sh")],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("FLAP_")},
            "HOME": str(home),
            "FLAP_HOME": str(home / "flap"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        stdout=(home / "output.txt").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def with_session(kits: Path, sites: int, seconds: float, use: Callable[[Any], Any]) -> Any:
    """Calls `use` with an administrator's session once server and sites are up."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    session, end = None, time.monotonic() + seconds
    while session is None or len(session.get_system_info().client_info) < sites:
        assert time.monotonic() < end, "server and sites did not come up"
        time.sleep(1)
        try:
            session = session or new_secure_session(ADMIN, str(kits / ADMIN))
        except Exception:  # the server is not up yet; its errors have several types
            session = None
    try:
        return use(session)
    finally:
        session.close()
