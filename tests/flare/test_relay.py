"""A relay of FLARE's between server and sites: all traffic passes it, and nothing changes."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kill_campaign import SETTINGS
from provisioned import SERVER, Provisioned

from flap_nvflare.data.phantom import write_phantom

RELAY = "relay"
SITES = ("A", "B", "C")
SMALL = {**SETTINGS, "rounds": 2, "local_epochs": 1, "cross_site": "global"}


@pytest.mark.provisioned
@pytest.mark.timeout(900)
def test_the_sites_talk_to_the_relay_alone_and_the_adapters_are_the_same(tmp_path: Path) -> None:
    scans = write_phantom(tmp_path / "scans", seed=0, sites=SITES)
    through, links, sums = _run(tmp_path / "through", scans, RELAY)
    assert links == {(RELAY, SERVER), *((site, RELAY) for site in SITES)}
    _, plain_links, plain_sums = _run(tmp_path / "plain", scans)
    assert plain_links == {(site, SERVER) for site in SITES}
    assert sums == plain_sums
    assert all(set(line["sites"]) == set(SITES) for line in through.rounds())


def _run(
    folder: Path, scans: Path, relay: str = ""
) -> tuple[Provisioned, set[tuple[str, str]], list[str]]:
    """Runs the job; who had a connection to whom while it ran; the adapters' SHA-256."""
    folder.mkdir()
    federation = Provisioned(
        folder,
        sites=SITES,
        settings=SMALL,
        data_root=scans,
        site_file={"own_process": "off"},
        environment={"OMP_NUM_THREADS": "1"},
        relay=relay,
    )
    federation.provision()
    try:
        federation.start()
        session = federation.session()
        if relay:
            _assert_certificates_are_asked_for(federation)
        job, links, end = federation.submit(session), set(), time.monotonic() + 400
        while not federation.status(session, job).startswith("FINISHED"):
            links |= connections(federation)
            assert time.monotonic() < end, federation.logs()
            time.sleep(0.3)
        assert federation.status(session, job) == "FINISHED:COMPLETED", federation.logs()
        session.close()
    finally:
        federation.stop()
    assert len(federation.rounds()) == SMALL["rounds"]
    files = [federation.runs()[-1] / f"adapter_{name}.safetensors" for name in ("last", "best")]
    return federation, links, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def connections(federation: Provisioned) -> set[tuple[str, str]]:
    """Pairs of members of which the first has opened a TCP connection to the second."""
    listening: dict[int, str] = {}
    opened: list[tuple[str, int]] = []
    for name in federation.members:
        for pid in federation.pids(name):
            try:
                found = psutil.Process(pid).net_connections("tcp")
            except psutil.Error:  # has just ended
                continue
            for one in found:
                if one.status == psutil.CONN_LISTEN:
                    listening[one.laddr.port] = name
                elif one.raddr:
                    opened.append((name, one.raddr.port))
    pairs = {(name, listening[port]) for name, port in opened if port in listening}
    return {(name, other) for name, other in pairs if name != other}


def _assert_certificates_are_asked_for(federation: Provisioned) -> None:
    """At the relay's port TLS shows the relay's certificate, and wants one of this federation."""
    site = federation.kits / SITES[0] / "startup"
    known = ssl.create_default_context(cafile=site / "rootCA.pem")
    known.load_cert_chain(site / "client.crt", site / "client.key")
    with _connected(known, federation.relay_port) as connection:
        certificate = connection.getpeercert() or {}
        assert (("commonName", RELAY),) in certificate["subject"]
    stranger = ssl.create_default_context(cafile=site / "rootCA.pem")
    with (
        _connected(stranger, federation.relay_port) as connection,
        pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"),
    ):
        connection.recv(1)  # a certificate that is missing is told after the handshake


@contextlib.contextmanager
def _connected(context: ssl.SSLContext, port: int) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection((SERVER, port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=SERVER) as connection,
    ):
        yield connection
