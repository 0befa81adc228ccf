"""The audit file: what a line holds, the chain, and what happens when it can't be written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from flap_nvflare.cli import main
from flap_nvflare.site.audit_log import (
    START,
    AuditError,
    AuditLog,
    Record,
    TensorRecord,
    _last_record,
    audit_path,
)
from flap_nvflare.site.audit_summary import render, summary

TENSOR = TensorRecord("a.lora_b", (2, 3), "float32", 24, "0" * 64, 1.5)
SENT = Record("out", "sent", "job1", "fed/1", 0, "train", "server", 100, "1" * 64, "OK")
SENT = dataclasses.replace(SENT, filters=("One", "Two"), tensors=(TENSOR,))
BLOCKED = Record("out", "blocked", "job1", task="train", bytes=9, reason="header 'x'")
ARRIVED = Record("in", "accepted", "job2", bytes=7)


def lines(kit: Path) -> list[bytes]:
    return audit_path(kit).read_bytes().splitlines()


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    log = AuditLog(tmp_path)
    for record in (SENT, BLOCKED, ARRIVED):
        log.append(record)
    return tmp_path


def test_a_line_holds_all_of_the_message_and_the_sum_of_the_line_before(kit: Path) -> None:
    first, second, third = map(json.loads, lines(kit))
    assert first["tensors"] == [
        {
            "name": "a.lora_b",
            "shape": [2, 3],
            "dtype": "float32",
            "bytes": 24,
            "sha256": "0" * 64,
            "norm": 1.5,
        }
    ]
    assert (first["job"], first["run"], first["round"]) == ("job1", "fed/1", 0)
    assert first["filters"] == ["One", "Two"]
    assert first["time"].endswith("+00:00")
    assert first["previous"] == START
    for line, after in zip(lines(kit), (second, third), strict=False):
        assert after["previous"] == hashlib.sha256(line).hexdigest()


def test_only_the_owner_may_read_it(kit: Path) -> None:
    assert stat.S_IMODE(audit_path(kit).stat().st_mode) == 0o600
    assert stat.S_IMODE(audit_path(kit).parent.stat().st_mode) == 0o700
    audit_path(kit).chmod(0o644)
    AuditLog(kit).append(SENT)
    assert stat.S_IMODE(audit_path(kit).stat().st_mode) == 0o600


def test_the_sum_up_by_job(kit: Path) -> None:
    found = summary(kit)
    assert found.intact
    assert found.lines == 3
    assert found.unreadable == ()
    one, two = found.jobs
    assert (one.sent, one.blocked, one.errors, one.bytes_out) == (1, 1, 0, 100)
    assert one.tensors == {"a.lora_b"}
    assert one.largest_norm == 1.5
    assert one.reasons == {"header 'x'": 1}
    assert (two.received, two.bytes_in, two.largest_norm) == (1, 7, None)
    assert [job.job for job in summary(kit, job="job2").jobs] == ["job2"]
    assert "chain: intact" in render(found)
    assert found.last_sha256 == hashlib.sha256(lines(kit)[-1]).hexdigest()


@pytest.mark.parametrize("change", ["value", "taken out", "put in", "swapped"])
def test_the_first_line_that_does_not_follow_is_named(kit: Path, change: str) -> None:
    found = lines(kit)
    if change == "value":
        found[0] = found[0].replace(b'"bytes":100', b'"bytes":101')
    elif change == "taken out":
        del found[0]
    elif change == "put in":
        found.insert(1, found[0])
    else:
        found[0], found[1] = found[1], found[0]
    audit_path(kit).write_bytes(b"\n".join(found) + b"\n")
    broken = summary(kit)
    assert broken.first_broken == (2 if change in ("value", "put in") else 1)
    assert "BROKEN at line" in render(broken)


def test_what_a_crash_left_breaks_no_chain_and_hides_no_change(kit: Path) -> None:
    with audit_path(kit).open("ab") as file:
        file.write(b'{"direction": "out", "outco')
    AuditLog(kit).append(SENT)
    AuditLog(kit).append(SENT)
    found = summary(kit)
    assert found.intact
    assert found.unreadable == (4,)
    assert found.lines == 6
    content = audit_path(kit).read_bytes()
    audit_path(kit).write_bytes(content.replace(b'"job2"', b'"job3"'))
    assert summary(kit).first_broken == 5
    audit_path(kit).write_bytes(content.replace(b'"outco\n', b'"outso\n'))
    assert summary(kit).first_broken == 5


@given(some.lists(some.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=6))
def test_the_last_record_is_found_whatever_follows_it(
    tmp_path_factory: pytest.TempPathFactory, junk: list[bytes]
) -> None:
    kit = tmp_path_factory.mktemp("kit")
    AuditLog(kit).append(SENT)
    AuditLog(kit).append(ARRIVED)
    (_, last) = lines(kit)
    with audit_path(kit).open("ab") as file:
        file.write(b"".join(one + b"\n" for one in junk))
    with audit_path(kit).open("rb") as file:
        found, whole = _last_record(file.fileno(), audit_path(kit).stat().st_size)
    assert whole
    assert found == b"\n".join([last, *junk])


def test_a_line_longer_than_a_block_is_found(tmp_path: Path) -> None:
    long = dataclasses.replace(SENT, tensors=(TENSOR,) * 2000)
    log = AuditLog(tmp_path)
    for record in (long, ARRIVED, long, long):
        log.append(record)
    assert len(lines(tmp_path)[0]) > 1 << 16
    assert summary(tmp_path).intact


def test_a_file_that_can_not_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "flap").write_text("a file in the folder's place")
    with pytest.raises(AuditError, match="nothing leaves the site"):
        AuditLog(tmp_path).append(SENT)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "flap").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    audit_path(tmp_path).symlink_to(elsewhere)
    with pytest.raises(AuditError):
        AuditLog(tmp_path).append(SENT)
    assert elsewhere.read_text() == ""


def test_a_record_is_never_half_of_a_number_that_json_lacks(tmp_path: Path) -> None:
    with pytest.raises(AuditError):
        AuditLog(tmp_path).append(
            dataclasses.replace(SENT, tensors=(dataclasses.replace(TENSOR, norm=float("nan")),))
        )


def test_no_file_says_when_it_comes_to_be(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="once its first job has run"):
        summary(tmp_path)


def _append_many(kit: Path, job: str) -> None:
    for _ in range(20):
        AuditLog(kit).append(Record("out", "sent", job, task="train"))


def test_processes_that_write_at_once_keep_one_chain(tmp_path: Path) -> None:
    start = multiprocessing.get_context("fork").Process
    running = [start(target=_append_many, args=(tmp_path, f"job{i}")) for i in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    found = summary(tmp_path)
    assert found.intact
    assert found.lines == 60
    assert [job.sent for job in found.jobs] == [20, 20, 20]


def test_the_disk_has_it_when_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    AuditLog(tmp_path).append(SENT)
    assert synced[0] == audit_path(tmp_path).stat().st_size


def test_the_command_sums_up_and_fails_on_a_broken_chain(
    kit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["site", "audit", str(kit), "--json", "--job", "job1"]
    assert main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["chain"] == "intact"
    assert [job["job"] for job in shown["jobs"]] == ["job1"]
    content = audit_path(kit).read_bytes()
    audit_path(kit).write_bytes(content.replace(b"job1", b"job9", 1))
    assert main(command) == 1
