"""A kit's certificate, its key, its issuer, and the signatures that FLARE put on its files."""

from __future__ import annotations

import base64
import datetime
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from flap_nvflare.settings import SettingsError
from flap_nvflare.site.finding import Finding
from flap_nvflare.site.kit import Kit, read_json

SIGNATURES = "signature.json"
NEW_KIT = (
    "ask the administrator of the federation for a new kit of this site (nvflare provision with "
    "the same project file), unpack it and run flap-nvflare site init on it"
)


def check_certificate(kit: Kit) -> Iterator[Finding]:
    """Certificate and root: readable, in date, issued by one another, matching the key."""
    certificate, root = read_certificate(kit.certificate), read_certificate(kit.root)
    yield _dates("certificate: dates", certificate)
    yield _dates("root certificate: dates", root)
    yield _issuer(kit, certificate, root)
    found = common_name(certificate)
    if found == kit.name:
        yield Finding("certificate: name", True, found)
    else:
        yield Finding("certificate: name", False, f"{found}, the kit is of {kit.name}", NEW_KIT)


def check_key(kit: Kit) -> Iterator[Finding]:
    """The private key: for its owner's eyes alone, readable, and that of the certificate."""
    mode = stat.S_IMODE(kit.key.stat().st_mode)
    open_to = mode & (stat.S_IRWXG | stat.S_IRWXO)
    found = f"{kit.key.name} has mode {mode:03o}"
    mend = "" if not open_to else f"chmod 600 {kit.key}"
    yield Finding("private key: mode", not open_to, found, mend)
    if not os.access(kit.key, os.R_OK):
        mend = f"run as the owner of {kit.key}, as FLARE must"
        yield Finding("private key", False, f"{kit.key}: may not be read", mend)
        return
    try:
        key = load_pem_private_key(kit.key.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        yield Finding(
            "private key", False, f"{kit.key}: no key without a password: {error}", NEW_KIT
        )
        return
    own = read_certificate(kit.certificate).public_key()
    if key.public_key() == own:
        yield Finding("private key", True, f"{kit.key.name} belongs to {kit.certificate.name}")
    else:
        found = f"{kit.key}: is not the key of {kit.certificate.name}: the two are of two kits"
        yield Finding("private key", False, found, "unpack one kit whole, or " + NEW_KIT)


def check_signatures(kit: Kit) -> Iterator[Finding]:
    """The root's signature on every startup file; FLARE signs kits with an encryption context."""
    path = kit.startup / SIGNATURES
    sealed = sorted(kit.startup.glob("*.tenseal"))
    if not path.is_file():
        if sealed:
            found = f"{path}: missing, and {sealed[0].name} is refused without it"
            yield Finding("signatures", False, found, NEW_KIT)
        else:
            yield Finding(
                "signatures", None, "FLARE signs kits for encrypted rounds only; this is none"
            )
        return
    wrong = list(_unsigned(kit, path))
    if wrong:
        found = f"changed since they were signed: {', '.join(wrong)}"
        mend = f"restore the files of {kit.startup} from the kit; what a site decides is in local"
        yield Finding("signatures", False, found, mend)
    else:
        yield Finding("signatures", True, "every startup file is as it was signed")


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM.

    Raises:
        SettingsError: if the file is missing, may not be read, or holds none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: no certificate can be read ({error}); {NEW_KIT}") from error


def common_name(certificate: x509.Certificate) -> str:
    """CN of the subject, by which FLARE knows its peers; empty if there is none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def now() -> datetime.datetime:
    """The machine's clock in UTC."""
    return datetime.datetime.now(datetime.timezone.utc)


def _dates(name: str, certificate: x509.Certificate) -> Finding:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    days = (ends - now()).days
    if now() < begins:
        mend = "set this machine's clock (timedatectl); if it is right, " + NEW_KIT
        return Finding(
            name, False, f"valid only from {_shown(begins)}, it is {_shown(now())}", mend
        )
    if now() >= ends:
        return Finding(name, False, f"expired {_shown(ends)}, {-days} days ago", NEW_KIT)
    return Finding(name, True, f"valid from {_shown(begins)} to {_shown(ends)}, {days} days left")


def _issuer(kit: Kit, certificate: x509.Certificate, root: x509.Certificate) -> Finding:
    name = "certificate: issuer"
    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        found = f"{kit.certificate}: was not issued by {kit.root.name}: the two are of two projects"
        return Finding(name, False, found, "unpack one kit whole, or " + NEW_KIT)
    return Finding(name, True, f"{common_name(root)}, by {kit.root.name}")


def _unsigned(kit: Kit, path: Path) -> Iterator[str]:
    """Startup files whose content is not what the root signed, or which it did not sign."""
    public = read_certificate(kit.root).public_key()
    if not isinstance(public, rsa.RSAPublicKey):
        raise SettingsError(f"{kit.root}: its key is no RSA key, as FLARE's are; {NEW_KIT}")
    signed = read_json(path)
    present = {file.name for file in kit.startup.iterdir()} - {path.name, "__pycache__"}
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
    for name in sorted(present | set(signed)):
        file = kit.startup / name
        try:
            content = name.encode() if file.is_dir() else file.read_bytes()
            signature = base64.b64decode(str(signed[name]), validate=True)
            public.verify(signature, content, scheme, hashes.SHA256())
        except (KeyError, OSError, ValueError, InvalidSignature):
            yield name


def _shown(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
