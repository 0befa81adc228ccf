"""A provisioned federation on loopback with FLARE's HEBuilder: three processes, three kits."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from encryption_cases import SMALL
from processes import stop
from safetensors import safe_open

from flap_nvflare.adapter.cipher import SEALED, Cipher
from flap_nvflare.adapter.update import UpdateSpec, load_update
from flap_nvflare.data.phantom import write_phantom
from flap_nvflare.flare.recipe import allow_components

JOB = Path(__file__).parents[2] / "jobs" / "fed_kits"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def provision(folder: Path) -> Path:
    """Startup kits of a server, two sites and an administrator."""
    port = free_port()
    lighter = "nvflare.lighter.impl"
    project = {
        "api_version": 3,
        "name": "hidden",
        "description": "encrypted rounds",
        "participants": [
            {"name": "localhost", "type": "server", "org": "o", "fed_learn_port": port}
            | {"admin_port": port, "default_host": "localhost"},
            {"name": "A", "type": "client", "org": "o"},
            {"name": "B", "type": "client", "org": "o"},
            {"name": "admin@o.org", "type": "admin", "org": "o", "role": "project_admin"},
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
            {
                "path": f"{lighter}.he.HEBuilder",
                "args": {
                    "poly_modulus_degree": 8192,
                    "coeff_mod_bit_sizes": [60, 60],
                    "scale_bits": 45,
                },
            },
            {"path": f"{lighter}.signature.SignatureBuilder"},
        ],
    }
    (folder / "project.yml").write_text(yaml.safe_dump(project, sort_keys=False))
    command = [Path(sys.executable).parent / "nvflare", "provision", "-p", folder / "project.yml"]
    environment = {**os.environ, "HOME": str(folder)}
    found = subprocess.run(
        [*command, "-w", folder / "work"], env=environment, capture_output=True, text=True
    )
    kits = folder / "work" / "hidden" / "prod_00"
    assert kits.is_dir(), found.stdout + found.stderr
    return kits


@pytest.fixture
def kits(tmp_path: Path) -> Iterator[Path]:
    """Running server and sites; what they started is ended with their sessions."""
    kits = provision(tmp_path)
    data = write_phantom(tmp_path / "scans", seed=0, sites=["A", "B"])
    running = []
    for name in ("localhost", "A", "B"):
        local = kits / name / "local"  # a site's own file replaces the default whole
        default = (local / "resources.json.default").read_text(encoding="utf-8")
        resources = default.replace("/tmp/nvflare", str(tmp_path / "store"))
        (local / "resources.json").write_text(resources, encoding="utf-8")
        allow_components(local)
        running.append(
            subprocess.Popen(
                ["bash", str(kits / name / "startup" / "sub_start.sh")],
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("FLAP_")},
                    "HOME": str(tmp_path),
                    "FLAP_HOME": str(tmp_path / f"flap_{name}"),
                    "FLAP_DATA_ROOT": str(data),
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                },
                stdout=(tmp_path / f"{name}.txt").open("w"),
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    yield kits
    for process in running:
        stop(process)


def submit(kits: Path, job: Path, seconds: float) -> None:
    """Runs the job by the administrator's kit until it ends."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    session, end = None, time.monotonic() + seconds
    while session is None or len(session.get_system_info().client_info) < 2:
        assert time.monotonic() < end, "server and sites did not come up"
        time.sleep(1)
        try:
            session = session or new_secure_session("admin@o.org", str(kits / "admin@o.org"))
        except Exception:  # the server is not up yet; its errors have several types
            session = None
    try:
        session.monitor_job(session.submit_job(str(job)), timeout=end - time.monotonic())
    finally:
        session.close()


@pytest.mark.slow
def test_a_server_without_the_key_runs_the_job_and_never_has_an_adapter(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    job = tmp_path / "fed_kits"
    shutil.copytree(JOB, job, ignore=shutil.ignore_patterns("custom"))
    settings = job / "app" / "config" / "federation.yaml"
    changed = {**yaml.safe_load(settings.read_text()), **SMALL, "encryption": "he"}
    settings.write_text(yaml.safe_dump(changed))
    meta = json.loads((job / "meta.json").read_text())
    meta["deploy_map"] = {"app": ["server", "A", "B"]}
    (job / "meta.json").write_text(json.dumps(meta))

    submit(kits, job, seconds=200)
    log = (tmp_path / "localhost.txt").read_text()
    server_home = tmp_path / "flap_localhost"
    (run,) = (server_home / "runs" / "fed_kits").glob("*")
    assert (run / "cross_site.json").is_file(), log[-4000:]

    # Nothing in the server's folders opens what it has.
    assert not (kits / "localhost" / "startup" / "client_context.tenseal").exists()
    context = (kits / "localhost" / "startup" / "server_context.tenseal").read_bytes()
    assert not Cipher(context).opens
    assert not (server_home / "simulated_keys").exists()
    site = Cipher((kits / "A" / "startup" / "client_context.tenseal").read_bytes())
    (own,) = (tmp_path / "flap_A" / "state").rglob("adapter.safetensors")
    plain: UpdateSpec = load_update(own)[1]
    files = sorted(run.rglob("*.safetensors"))
    assert [path.name for path in files] == [
        "adapter_best.safetensors",
        "adapter_last.safetensors",
        "server_2.safetensors",
    ]
    with safe_open(str(files[-1]), framework="pt") as state:
        assert not list(state.keys())  # a linear rule remembers nothing
    for path in files[:-1]:
        sealed, spec, _ = load_update(path)
        assert set(sealed) == SEALED
        assert spec == site.spec(plain)
        opened = site.open(sealed, plain)
        assert sum(float(tensor.square().sum()) for tensor in opened.values()) ** 0.5 < 1e4
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [set(line["sites"]) for line in rounds] == [{"A", "B"}] * 2
