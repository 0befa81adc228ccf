"""Certificate, key, issuer and signatures of a kit: right, and wrong in each way."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from kit_files import DAY, Authority, write_certificate, write_key, write_kit

from flap_nvflare.site.doctor_certificate import check_certificate, check_key, check_signatures
from flap_nvflare.site.finding import Finding, guarded
from flap_nvflare.site.kit import Kit


def failed(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.ok is False}


def test_a_new_kit_has_nothing_wrong(kit: Kit) -> None:
    findings = [*check_certificate(kit), *check_key(kit)]
    assert all(finding.ok for finding in findings)
    (dates,) = [f for f in findings if f.name == "certificate: dates"]
    assert "29 days left" in dates.found


@pytest.mark.parametrize(
    ("begins", "ends", "said", "mend"),
    [
        (-20 * DAY, -2 * DAY - datetime.timedelta(hours=1), "expired", "ask the administrator"),
        (2 * DAY, 20 * DAY, "valid only from", "clock"),
    ],
)
def test_dates_that_do_not_hold_today(
    tmp_path: Path,
    authority: Authority,
    begins: datetime.timedelta,
    ends: datetime.timedelta,
    said: str,
    mend: str,
) -> None:
    kit = write_kit(tmp_path / "A", authority, begins=begins, ends=ends)
    wrong = failed(check_certificate(kit))
    assert list(wrong) == ["certificate: dates"]
    assert said in wrong["certificate: dates"].found
    assert mend in wrong["certificate: dates"].mend
    assert "new kit" in wrong["certificate: dates"].mend


def test_an_expired_root(kit: Kit, authority: Authority) -> None:
    write_certificate(kit.root, authority.certificate(authority.name, authority.key, ends=-DAY / 2))
    assert list(failed(check_certificate(kit))) == ["root certificate: dates"]


def test_a_certificate_of_another_root(kit: Kit, stranger: Authority) -> None:
    write_certificate(kit.root, stranger.certificate(stranger.name, stranger.key))
    wrong = failed(check_certificate(kit))
    assert list(wrong) == ["certificate: issuer"]
    assert "two projects" in wrong["certificate: issuer"].found


def test_the_certificate_of_another_site(kit: Kit, authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    write_certificate(kit.certificate, authority.certificate("B", key))
    assert list(failed(check_certificate(kit))) == ["certificate: name"]
    wrong = failed(check_key(kit))
    assert list(wrong) == ["private key"]
    assert "is not the key of client.crt" in wrong["private key"].found


def test_no_certificate_at_all(kit: Kit) -> None:
    kit.certificate.write_text("nothing")
    (finding,) = guarded("certificate", lambda: check_certificate(kit))
    assert finding.ok is False
    assert str(kit.certificate) in finding.found
    assert "new kit" in finding.mend


def test_a_key_that_others_may_read(kit: Kit) -> None:
    kit.key.chmod(0o640)
    wrong = failed(check_key(kit))
    assert wrong["private key: mode"].mend == f"chmod 600 {kit.key}"
    assert "640" in wrong["private key: mode"].found


def test_a_key_that_is_damaged(kit: Kit) -> None:
    kit.key.write_bytes(kit.key.read_bytes()[:100])
    assert list(failed(check_key(kit))) == ["private key"]


def test_a_key_that_is_missing(kit: Kit) -> None:
    kit.key.unlink()
    (finding,) = guarded("private key", lambda: check_key(kit))
    assert finding.ok is False


def signed(kit: Kit, authority: Authority) -> Path:
    files = sorted(path for path in kit.startup.iterdir() if path.is_file())
    path = kit.startup / "signature.json"
    path.write_text(json.dumps({f.name: authority.sign(f.read_bytes()) for f in files}))
    return path


def test_a_kit_without_encryption_is_not_signed(kit: Kit) -> None:
    (finding,) = check_signatures(kit)
    assert finding.ok is None


def test_signed_files(kit: Kit, authority: Authority) -> None:
    (kit.startup / "client_context.tenseal").write_bytes(b"context")
    (finding,) = check_signatures(kit)
    assert finding.ok is False
    assert "client_context.tenseal" in finding.found

    signed(kit, authority)
    (finding,) = check_signatures(kit)
    assert finding.ok is True

    (kit.startup / "start.sh").write_text("something else")
    (kit.startup / "added.sh").write_text("unsigned")
    (finding,) = check_signatures(kit)
    assert finding.found == "changed since they were signed: added.sh, start.sh"


def test_signatures_of_another_root(kit: Kit, stranger: Authority) -> None:
    signed(kit, stranger)
    (finding,) = check_signatures(kit)
    assert finding.ok is False


def test_a_key_with_a_password_or_of_another_kind(kit: Kit) -> None:
    write_key(kit.key, ec.generate_private_key(ec.SECP384R1()))
    assert list(failed(check_key(kit))) == ["private key"]
