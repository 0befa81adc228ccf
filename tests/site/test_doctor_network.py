"""The way to the server against real sockets on loopback: TLS, refusals, silence, clocks."""

from __future__ import annotations

import dataclasses
import datetime
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from kit_files import DAY, Authority, listening, write_certificate, write_key, write_kit

from flap_nvflare.site import doctor_network
from flap_nvflare.site.doctor_network import check_clock, check_listening, check_server
from flap_nvflare.site.finding import Finding
from flap_nvflare.site.kit import Kit


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_network, "_REFUSAL", 0.3)


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Kit:
    return write_kit(tmp_path / "server", authority, name="localhost", server=True)


def at(kit: Kit, port: int, **changes: str) -> Kit:
    return dataclasses.replace(kit, host="127.0.0.1", port=port, **changes)


def last(findings: Iterator[Finding]) -> Finding:
    return list(findings)[-1]


def test_both_sides_prove_themselves(kit: Kit, server: Kit) -> None:
    with listening(server) as port:
        findings = list(check_server(at(kit, port)))
    assert [f.name for f in findings] == [
        "server: name",
        "server: port",
        "server: TLS",
        "server: dates",
    ]
    assert all(f.ok for f in findings), findings
    assert "TLSv1" in findings[2].found


def test_a_server_of_another_federation(kit: Kit, tmp_path: Path, stranger: Authority) -> None:
    other = write_kit(tmp_path / "other", stranger, name="localhost", server=True)
    with listening(other) as port:
        finding = last(check_server(at(kit, port)))
    assert finding.name == "server: TLS"
    assert finding.ok is False
    assert "rootCA.pem" in finding.found


def test_a_site_that_the_server_does_not_know(kit: Kit, server: Kit, stranger: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    write_certificate(kit.certificate, stranger.certificate("A", key))
    write_key(kit.key, key)
    with listening(server) as port:
        finding = last(check_server(at(kit, port)))
    assert finding.ok is False
    assert "refuses this site's certificate" in finding.found


def test_an_expired_certificate_of_the_server(
    kit: Kit, tmp_path: Path, authority: Authority
) -> None:
    late = write_kit(
        tmp_path / "late", authority, "localhost", True, begins=-9 * DAY, ends=-2 * DAY
    )
    with listening(late) as port:
        finding = last(check_server(at(kit, port)))
    assert finding.ok is False
    assert "expired" in finding.found
    assert "clock" in finding.mend


def test_another_server_of_the_federation(kit: Kit, server: Kit) -> None:
    with listening(server) as port:
        findings = list(check_server(at(kit, port, identity="flare.hospital.org")))
    assert findings[2].ok is False
    assert findings[2].found == "localhost answers, expected flare.hospital.org"


def test_grpc_compares_the_host_too(kit: Kit, server: Kit) -> None:
    with listening(server, ("h2",)) as port:
        findings = list(check_server(at(kit, port, scheme="grpc")))
        named = dataclasses.replace(kit, host="localhost", port=port, scheme="grpc")
        assert list(check_server(named))[2].ok is True
    assert findings[2].ok is False
    assert "gRPC refuses 127.0.0.1" in findings[2].found
    assert "/etc/hosts" in findings[2].mend


def test_a_port_without_tls(kit: Kit) -> None:
    with listening() as port:
        finding = last(check_server(at(kit, port)))
    assert finding.name == "server: TLS"
    assert finding.ok is False


def test_a_kit_without_tls(kit: Kit) -> None:
    with listening() as port:
        finding = last(check_server(at(kit, port, security="clear")))
    assert finding.ok is False
    assert "without TLS" in finding.found


def test_a_closed_port(kit: Kit) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finding = last(check_server(at(kit, port)))
    assert finding.name == "server: port"
    assert "refuses connections" in finding.found
    assert "start the server" in finding.mend


def test_a_firewall_that_drops_packets(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(doctor_network.socket, "create_connection", silent)
    finding = last(check_server(at(kit, 9), timeout=2))
    assert finding.found == "127.0.0.1:9 does not answer within 2 s"
    assert "firewall" in finding.mend


def test_a_name_without_an_address(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(doctor_network.socket, "getaddrinfo", unknown)
    (finding,) = check_server(dataclasses.replace(kit, host="flare.hospital.org"))
    assert finding.ok is False
    assert "/etc/hosts" in finding.mend


def test_the_servers_own_port(server: Kit) -> None:
    with listening(server) as port:
        (finding,) = check_listening(at(server, port))
        assert finding.ok is True
        assert "already running" in finding.found
    with listening() as port:
        (finding,) = check_listening(at(server, port))
        assert finding.ok is False
        assert "another program" in finding.found
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    (finding,) = check_listening(at(server, port))
    assert finding.found == f"{port} is free"


def test_a_clock_before_the_kit_was_made(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = check_clock(kit, tmp_path / "not" / "there")
    assert finding.ok is True
    assert "can't be seen" in finding.found

    long_ago = datetime.datetime(2001, 1, 1, tzinfo=datetime.timezone.utc)
    monkeypatch.setattr(doctor_network, "now", lambda: long_ago)
    (finding,) = check_clock(kit, tmp_path)
    assert finding.ok is False
    assert "before the kit was made" in finding.found


def test_a_file_server_with_another_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor_network.time.time
    monkeypatch.setattr(doctor_network.time, "time", lambda: real() + 3600)
    (finding,) = check_clock(None, tmp_path)
    assert finding.ok is False
    assert "-3600 s" in finding.found
