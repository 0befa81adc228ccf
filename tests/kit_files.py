"""Startup kits as FLARE makes them, with certificates of a test's own choosing."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from flap_nvflare.site.kit import Kit, read_kit

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """A federation's root: its key signs certificates and files."""

    name: str
    key: rsa.RSAPrivateKey

    @classmethod
    def make(cls, name: str = "federation") -> Authority:
        return cls(name, rsa.generate_private_key(65537, 2048))

    def certificate(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = 30 * DAY,
    ) -> x509.Certificate:
        """A certificate valid from `begins` to `ends` from now."""
        now = datetime.datetime.now(datetime.timezone.utc)
        own = name == self.name
        names = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        issuer = [x509.NameAttribute(NameOID.COMMON_NAME, self.name)]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name(names))
            .issuer_name(x509.Name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def sign(self, content: bytes) -> str:
        """A signature as FLARE's provisioning writes it into signature.json."""
        scheme = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
        return base64.b64encode(self.key.sign(content, scheme, hashes.SHA256())).decode()


def write_kit(
    folder: Path,
    authority: Authority,
    name: str = "A",
    server: bool = False,
    host: str = "localhost",
    port: int = 1,
    scheme: str = "tcp",
    begins: datetime.timedelta = -DAY,
    ends: datetime.timedelta = 30 * DAY,
) -> Kit:
    """A whole kit of a site, or of the server, whose name is then `name`."""
    startup, local = folder / "startup", folder / "local"
    startup.mkdir(parents=True)
    local.mkdir()
    who = "server" if server else "client"
    key = ec.generate_private_key(ec.SECP256R1())
    write_certificate(startup / f"{who}.crt", authority.certificate(name, key, begins, ends))
    write_key(startup / f"{who}.key", key)
    write_certificate(startup / "rootCA.pem", authority.certificate(authority.name, authority.key))
    for script in ("start.sh", "sub_start.sh", "stop_fl.sh"):
        (startup / script).write_text("#!/usr/bin/env bash\n")
    keys = {"ssl_cert": f"{who}.crt", "ssl_private_key": f"{who}.key"}
    keys |= {"ssl_root_cert": "rootCA.pem", "connection_security": "mtls"}
    first = {"service": {"target": f"{host}:{port}", "scheme": scheme}, "identity": "localhost"}
    values = (
        {"servers": [{**first, **keys, "admin_server": name, "identity": name}]}
        if server
        else {"servers": [first], "client": {**keys, "fqsn": name}}
    )
    (startup / f"fed_{who}.json").write_text(json.dumps(values))
    rights = {"lead": {"byoc": "any"}, "project_admin": "any", "member": {"view": "any"}}
    defaults = {"resources": {"class_allow_list": ["nvflare."]}, "log_config": {}}
    for stem, content in {**defaults, "authorization": {"permissions": rights}}.items():
        (local / f"{stem}.json.default").write_text(json.dumps(content))
    return read_kit(folder)


def lay_overlay(kit: Kit, site_file: str = "") -> None:
    """What a hospital lays over its kit, as far as it is looked at."""
    gate = [{"path": "flap_nvflare.flare.site_gate.SiteGate"}]
    scope = {"name": "flap", "task_data_filters": gate, "task_result_filters": gate}
    last = {"id": "last_gate", "path": "flap_nvflare.flare.last_gate.LastGate"}
    files = {
        "resources.json": {
            "class_allow_list": ["nvflare.", "flap_nvflare."],
            "allow_log_streaming": False,
            "components": [],
        },
        "privacy.json": {"scopes": [scope], "default_scope": "flap", "components": [last]},
        "authorization.json": {"permissions": {"lead": {"byoc": "none"}, "member": "none"}},
    }
    for name, content in files.items():
        (kit.local / name).write_text(json.dumps(content))
    (kit.local / "flap_site.yaml").write_text(site_file)


def write_certificate(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(Encoding.PEM))


def write_key(path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    kind = PrivateFormat.TraditionalOpenSSL
    path.write_bytes(key.private_bytes(Encoding.PEM, kind, NoEncryption()))
    path.chmod(0o600)


@contextlib.contextmanager
def listening(kit: Kit | None = None, protocols: tuple[str, ...] = ()) -> Iterator[int]:
    """A server on loopback that asks for certificates of the kit's root; gives its port.

    Args:
        kit: of the server; None takes connections and answers in plain words.
        protocols: those of TLS's ALPN that it speaks; without one of them it refuses.
    """
    context = None
    if kit is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(kit.certificate, kit.key)
        context.load_verify_locations(kit.root)
        context.verify_mode = ssl.CERT_REQUIRED
        if protocols:
            context.set_alpn_protocols(list(protocols))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        thread = threading.Thread(target=_serve, args=(server, context), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # wakes the thread
    thread.join(10)


def _serve(server: socket.socket, context: ssl.SSLContext | None) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # closed
            return
        with contextlib.suppress(OSError), connection:
            if context is None:
                connection.sendall(b"220 no TLS here\r\n")
                continue
            with context.wrap_socket(connection, server_side=True) as secure:
                secure.settimeout(5)
                secure.recv(1)  # until the other side has gone
