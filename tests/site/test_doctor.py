"""The doctor as a whole: a sound site, bare kits, real ones by FLARE, and the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kit_files import Authority, lay_overlay, listening, write_kit
from scan_files import write_sites

from flap_nvflare.cli import main
from flap_nvflare.sam.checkpoint import PACKAGED, file_sha256
from flap_nvflare.settings import (
    BUNDLE_VARIABLE,
    CHECKPOINT_VARIABLE,
    DATA_VARIABLE,
    Federation,
    SettingsError,
)
from flap_nvflare.site import doctor
from flap_nvflare.site.doctor import Finding, Questions, checks
from flap_nvflare.site.kit import Kit, read_kit

LIGHTER = "nvflare.lighter.impl"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAP_HOME", str(tmp_path / "home"))
    for name in (BUNDLE_VARIABLE, CHECKPOINT_VARIABLE, DATA_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    write_sites(tmp_path / "scans", ["A"], slices=(4,))
    return tmp_path / "scans"


def failed(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.ok is False]


def site_file(scans: Path, state: Path) -> str:
    values = {"data_root": str(scans), "state_dir": str(state), "device": "cpu"}
    values["checkpoint_sha256"] = file_sha256(PACKAGED)
    return yaml.safe_dump(values)


def to_port(kit: Kit, port: int) -> None:
    path = kit.startup / "fed_client.json"
    values = json.loads(path.read_text())
    values["servers"][0]["service"]["target"] = f"127.0.0.1:{port}"
    path.write_text(json.dumps(values))


def test_a_sound_site_has_nothing_to_mend(
    kit: Kit, authority: Authority, scans: Path, tmp_path: Path
) -> None:
    lay_overlay(kit, site_file(scans, tmp_path / "state"))
    server = write_kit(tmp_path / "server", authority, name="localhost", server=True)
    with listening(server) as port:
        to_port(kit, port)
        findings = checks(kit.folder)
    assert failed(findings) == []
    assert [f.name for f in findings if f.ok is None] == ["signatures"]
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    picture = kit.folder / "flap" / "doctor.png"
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    assert not (tmp_path / "state").exists()  # it looks, it leaves nothing else


def test_a_bare_kit_fails_where_it_must(kit: Kit) -> None:
    to_port(kit, 1)
    assert failed(checks(kit.folder)) == [
        "allow-list",
        "gate",
        "code in jobs",
        "files here",
        "server: port",
        "site file",
        "cases",
    ]


def test_a_kit_with_a_file_lost(kit: Kit) -> None:
    (kit.startup / "start.sh").unlink()
    (kit.local / "log_config.json.default").unlink()
    (finding,) = [f for f in checks(kit.folder) if f.name == "kit"]
    assert finding.found.endswith("lacks startup/start.sh, local/log_config.json.default")


def test_a_site_file_that_cannot_be_read(kit: Kit) -> None:
    lay_overlay(kit, "data_root: [")
    findings = checks(kit.folder)
    assert "site file" in failed(findings)
    assert findings[-1].ok is None


def test_a_server_has_no_scans(tmp_path: Path, authority: Authority) -> None:
    server = write_kit(tmp_path / "server", authority, name="localhost", server=True)
    names = [finding.name for finding in checks(server.folder)]
    assert "port" in names
    assert "code in jobs" in names
    assert not {"cases", "server: port", "gate", "base weights"} & set(names)


def test_the_machine_alone(scans: Path, tmp_path: Path) -> None:
    findings = checks(None, Questions(data_root=str(scans), picture=tmp_path / "a.png"))
    assert failed(findings) == []
    assert (tmp_path / "a.png").is_file()
    assert [f.name for f in findings if f.ok is None] == ["kit", "base weights: SHA-256"]
    bare = {finding.name: finding.ok for finding in checks(None)}
    assert bare["cases"] is None
    assert "picture" not in bare


def test_the_job_to_come_asks_for_other_weights(scans: Path) -> None:
    asked = Federation(arch="vit_b", image_size=224)
    assert failed(checks(None, Questions(federation=asked))) == ["base weights"]
    fresh = dataclasses.replace(asked, base="random")
    assert failed(checks(None, Questions(federation=fresh))) == []


def test_the_limits_of_the_site_for_the_job_to_come(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_overlay(kit, "device: cpu")
    asked = Questions(federation=Federation())
    found = {finding.name: finding for finding in checks(kit.folder, asked)}
    assert found["limits"].ok is True

    def refuses(*_: object) -> None:
        raise RuntimeError("method 'flap' is not allowed here")

    monkeypatch.setattr("flap_nvflare.site.site_file.Limits.check", refuses)
    found = {finding.name: finding for finding in checks(kit.folder, asked)}
    assert found["limits"].ok is False
    assert "method 'flap'" in found["limits"].found


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(doctor.doctor_machine, "check_device", broken)
    monkeypatch.setattr(doctor.doctor_weights, "check_weights", broken)
    findings = checks(None)
    assert failed(findings) == ["device", "base weights"]
    assert findings[-1].name == "disk"  # the others were made


def test_folders_that_are_no_kit(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no FLARE startup kit"):
        checks(tmp_path)
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "fed_admin.json").write_text("{}")
    with pytest.raises(SettingsError, match="administrator's kit"):
        checks(tmp_path)
    (tmp_path / "startup" / "fed_client.json").write_text("{}")
    with pytest.raises(SettingsError, match="unpack the kit again"):
        checks(tmp_path)


def test_the_command_prints_what_to_do(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--data-root", str(scans), "--site", "A"]) == 0
    text = capsys.readouterr().out
    assert "0 fail" in text
    assert "Nothing of this was sent anywhere." in text
    (scans / "case_00001" / "imaging.nii.gz").write_bytes(b"cut")
    assert main(["doctor", "--data-root", str(scans)]) == 1
    text = capsys.readouterr().out
    assert "fail    case case_00001" in text
    assert "-> copy the file again" in text


def test_a_federation_of_the_sites_own_network(scans: Path, tmp_path: Path) -> None:
    asked = Federation(arch="bundle", method="named", parameters=("a.*",), rule="mean")
    questions = Questions(federation=asked, data_root=str(scans), site="A")
    assert failed(checks(None, questions)) == ["own network"]


def test_the_command_for_programs(
    kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "federation.yaml"
    settings.write_text("profile: demo\n")
    assert main(["doctor", str(kit.folder), "--federation", str(settings), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert {row["verdict"] for row in found["findings"]} == {"ok", "fail", "skipped"}
    assert all(row["mend"] for row in found["findings"] if row["verdict"] == "fail")
    assert main(["doctor", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("flap-nvflare doctor: ")


def provision(folder: Path) -> Path:
    """Kits by FLARE itself; for encrypted rounds, which are signed, where that is installed."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    sealing = {
        "path": f"{LIGHTER}.he.HEBuilder",
        "args": {"poly_modulus_degree": 8192, "coeff_mod_bit_sizes": [60, 60], "scale_bits": 45},
    }
    template = {"template_file": "master_template.yml"}
    project = {
        "api_version": 3,
        "name": "checked",
        "description": "kits to look at",
        "participants": [
            {"name": "localhost", "type": "server", "org": "o", "default_host": "localhost"}
            | {"fed_learn_port": port, "admin_port": port},
            {"name": "A", "type": "client", "org": "o"},
            {"name": "admin@o.org", "type": "admin", "org": "o", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{LIGHTER}.workspace.WorkspaceBuilder", "args": template},
            {
                "path": f"{LIGHTER}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            {"path": f"{LIGHTER}.cert.CertBuilder"},
            *([sealing] if importlib.util.find_spec("tenseal") else []),
            {"path": f"{LIGHTER}.signature.SignatureBuilder"},
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
    kits = folder / "work" / "checked" / "prod_00"
    assert kits.is_dir(), found.stdout + found.stderr
    return kits


def test_kits_that_flare_made(tmp_path: Path, scans: Path) -> None:
    kits = provision(tmp_path)
    own, server = read_kit(kits / "A"), read_kit(kits / "localhost")
    assert (own.name, own.host, own.scheme) == ("A", "localhost", "grpc")
    lay_overlay(own, site_file(scans, tmp_path / "state"))
    with listening(server, ("h2",)) as port:
        path = own.startup / "fed_client.json"
        path.write_text(path.read_text().replace(f":{own.port}", f":{port}"))
        findings = {finding.name: finding for finding in checks(own.folder)}
    # The one file that was changed is noticed where FLARE signed it.
    signed = (own.startup / "signature.json").is_file()
    assert failed(list(findings.values())) == (["signatures"] if signed else [])
    if signed:
        assert findings["signatures"].found.endswith("were signed: fed_client.json")
    assert findings["server: TLS"].ok is True
    at_server = {finding.name: finding for finding in checks(server.folder)}
    assert at_server["signatures"].ok is (True if signed else None)
    assert failed(list(at_server.values())) == [
        "allow-list",
        "code in jobs",
        "files here",
    ]
    with pytest.raises(SettingsError, match="administrator's kit"):
        checks(kits / "admin@o.org")
