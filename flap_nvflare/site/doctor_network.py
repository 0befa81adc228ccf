"""The way to the federation's server: its name, its port, its certificate, and the clocks.

One connection is opened and closed again. Nothing of the site is sent but its certificate.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

from cryptography import x509

from flap_nvflare.site.doctor_certificate import common_name, now, read_certificate
from flap_nvflare.site.doctor_machine import existing
from flap_nvflare.site.finding import Finding
from flap_nvflare.site.kit import Kit

TIMEOUT = 5.0  # seconds
# A server that refuses the site's certificate says so within this time after the handshake.
_REFUSAL = 1.0
# Clocks of a machine and its file server further apart than this stand in each other's way.
_CLOCK_TOLERANCE = 60.0


class Unreachable(Exception):
    """No connection; holds the finding that says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.found)
        self.finding = finding


def check_server(kit: Kit, timeout: float = TIMEOUT) -> Iterator[Finding]:
    """Name, port and TLS handshake with the kit's certificate, one after the other."""
    try:
        address = _resolve(kit)
        yield Finding("server: name", True, f"{kit.host} is {address}")
        connection = _connect(kit, timeout)
        with connection:
            yield Finding("server: port", True, f"{kit.host}:{kit.port} accepts connections")
            if kit.security == "clear":
                found = "the kit asks for connections without TLS: whoever listens reads along"
                mend = "ask the administrator for a kit with connection_security mtls"
                yield Finding("server: TLS", False, found, mend)
                return
            certificate, version = handshake(kit, connection)
    except Unreachable as error:
        yield error.finding
        return
    yield _identity(kit, certificate, version)
    yield _server_dates(certificate)


def check_listening(kit: Kit) -> Iterator[Finding]:
    """At the server itself: whether its port is free, or FLARE's server has it already."""
    family = socket.AF_INET6 if ":" in kit.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", kit.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                mend = "take a port above 1024 in the project file, or let this user open it"
                yield Finding("port", False, f"{kit.port}: {error.strerror}", mend)
                return
        else:
            yield Finding("port", True, f"{kit.port} is free")
            return
    try:
        with socket.create_connection(("localhost", kit.port), TIMEOUT) as connection:
            certificate, _ = handshake(kit, connection)
        own = common_name(certificate) == kit.identity
    except (OSError, Unreachable):
        own = False
    mend = "" if own else "end the program that has the port, or provision another port"
    who = "this server, already running" if own else "another program"
    yield Finding("port", own, f"{kit.port} is in use by {who}", mend)


def check_clock(kit: Kit | None, folder: Path) -> Iterator[Finding]:
    """The clock against what is here: the kit's dates and the time of the file system.

    Args:
        kit: the startup kit, whose certificate was not issued in the future.
        folder: where the site writes, perhaps on another machine's disk.
    """
    said = []
    if kit is not None:
        begins = read_certificate(kit.certificate).not_valid_before_utc
        if now() < begins:
            found = f"it is {now():%Y-%m-%d %H:%M} UTC, before the kit was made"
            mend = "set the clock: timedatectl set-ntp true"
            yield Finding("clock", False, found, mend)
            return
        said.append("after the kit was made")
    with NamedTemporaryFile(dir=existing(folder)) as file:
        before = time.time()
        file.write(b"x")
        file.flush()
        apart = Path(file.name).stat().st_mtime - before
    if abs(apart) > _CLOCK_TOLERANCE:
        found = f"the file system of {folder} is {apart:+.0f} s from this machine's clock"
        mend = "let both machines set their clocks by NTP: timedatectl set-ntp true"
        yield Finding("clock", False, found, mend)
        return
    said.append("the file system agrees")
    unknown = (
        "minutes of error can't be seen without a time server: timedatectl says if one is used"
    )
    yield Finding("clock", True, f"{now():%Y-%m-%d %H:%M} UTC, {', '.join(said)}; {unknown}")


def handshake(kit: Kit, connection: socket.socket) -> tuple[x509.Certificate, str]:
    """The server's certificate and TLS version, after it has seen the kit's.

    Raises:
        Unreachable: if either side refuses the other.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # As FLARE does it: the name is compared below, with the one in the kit.
    context.check_hostname = False
    if kit.scheme == "grpc":
        context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(kit.root)
        if kit.security == "mtls" or kit.server:
            context.load_cert_chain(kit.certificate, kit.key)
        with context.wrap_socket(connection, server_hostname=kit.identity) as secure:
            der, version = secure.getpeercert(binary_form=True), secure.version()
            # In TLS 1.3 the server judges the site's certificate after the handshake.
            secure.settimeout(_REFUSAL)
            with contextlib.suppress(TimeoutError):
                if secure.recv(1) == b"" and version == "TLSv1.3":
                    raise Unreachable(_refused("it closes the connection"))
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(_untrusted(kit, error)) from error
    except ssl.SSLError as error:
        raise Unreachable(_refused(_reason(error))) from error
    except OSError as error:
        found = f"{kit.host}:{kit.port} speaks no TLS ({type(error).__name__}: {error})"
        mend = (
            "ask the administrator whether this is the server's learning port; let the firewall "
            "pass TLS without inspecting it"
        )
        raise Unreachable(Finding("server: TLS", False, found, mend)) from error
    assert der is not None  # PROTOCOL_TLS_CLIENT asks for one
    return x509.load_der_x509_certificate(der), str(version)


def _resolve(kit: Kit) -> str:
    try:
        return str(socket.getaddrinfo(kit.host, kit.port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        found = f"{kit.host} has no address ({error.strerror or error})"
        mend = f"write the server's address into /etc/hosts: 'ADDRESS {kit.host}', or into the DNS"
        raise Unreachable(Finding("server: name", False, found, mend)) from error


def _connect(kit: Kit, timeout: float) -> socket.socket:
    place = f"{kit.host}:{kit.port}"
    try:
        return socket.create_connection((kit.host, kit.port), timeout)
    except TimeoutError as error:
        found = f"{place} does not answer within {timeout:g} s"
        mend = (
            f"let the hospital's firewall pass outgoing TCP to {place}; ask the administrator "
            "whether the server's does too"
        )
        raise Unreachable(Finding("server: port", False, found, mend)) from error
    except ConnectionRefusedError as error:
        found = f"{place} refuses connections"
        mend = (
            "the machine is there but nothing listens: ask the administrator to start the server "
            "(startup/start.sh) or to check the port"
        )
        raise Unreachable(Finding("server: port", False, found, mend)) from error
    except OSError as error:
        mend = f"check this machine's network and its route to {kit.host}"
        finding = Finding("server: port", False, f"{place}: {error.strerror or error}", mend)
        raise Unreachable(finding) from error


def _untrusted(kit: Kit, error: ssl.SSLCertVerificationError) -> Finding:
    found = f"the server's certificate fails against {kit.root.name}: {error.verify_message}"
    mend = (
        "ask the administrator for a kit of the project that the server runs; if a firewall "
        "inspects TLS, let this connection pass it untouched"
    )
    if "expired" in error.verify_message or "not yet valid" in error.verify_message:
        mend = "check this machine's clock (timedatectl); if it is right, " + _SERVER_KIT
    return Finding("server: TLS", False, found, mend)


_SERVER_KIT = "ask the administrator to provision the federation again"


def _refused(reason: str) -> Finding:
    found = f"the server refuses this site's certificate or its TLS ({reason})"
    mend = (
        "ask the administrator whether the kit is of the project that the server runs, and "
        "whether this is the learning port"
    )
    return Finding("server: TLS", False, found, mend)


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


def _identity(kit: Kit, certificate: x509.Certificate, version: str) -> Finding:
    found = common_name(certificate)
    names = _names(certificate)
    if found == kit.identity and kit.scheme == "grpc" and kit.host not in names:
        # Of FLARE's transports only gRPC compares the host as well.
        mend = f"connect to one of these names: '{names[0] if names else found}' in /etc/hosts"
        shown = f"gRPC refuses {kit.host}: the server's certificate is for {', '.join(names)}"
        return Finding("server: TLS", False, shown, mend)
    if found == kit.identity:
        return Finding(
            "server: TLS", True, f"{version}, {found} proved itself, and so did the site"
        )
    mend = (
        f"another server of the project answers at {kit.host}: mend its address in /etc/hosts or "
        "the DNS, or ask for a new kit"
    )
    return Finding("server: TLS", False, f"{found} answers, expected {kit.identity}", mend)


def _names(certificate: x509.Certificate) -> list[str]:
    """Hosts and addresses that the certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def _server_dates(certificate: x509.Certificate) -> Finding:
    ends: datetime.datetime = certificate.not_valid_after_utc
    return Finding(
        "server: dates", True, f"certificate valid to {ends:%Y-%m-%d}, {(ends - now()).days} days"
    )
