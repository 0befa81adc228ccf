"""What `flap-nvflare site audit KIT` says of the audit file: jobs, messages, and the chain."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flap_nvflare.site.audit_log import (
    ACCEPTED,
    BLOCKED,
    IN,
    PREVIOUS,
    SENT,
    START,
    audit_path,
    read_lines,
)


@dataclass
class JobSummary:
    """What one job's messages were.

    Attributes:
        job: FLARE's id of the job.
        run: the run's name.
        first, last: times of its first and last message.
        sent: messages that left with data.
        errors: replies that left with a return code and no data.
        blocked: messages that were stopped.
        bytes_out: bytes of all that left.
        tensors: names of all tensors that left.
        largest_norm: largest L2 norm of a tensor that left; None if none had one.
        received: messages that came in and were accepted.
        refused: messages that came in and were refused.
        bytes_in: bytes of all that came in.
        reasons: how often something was stopped or refused, by reason.
    """

    job: str
    run: str = ""
    first: str = ""
    last: str = ""
    sent: int = 0
    errors: int = 0
    blocked: int = 0
    bytes_out: int = 0
    tensors: set[str] = field(default_factory=set)
    largest_norm: float | None = None
    received: int = 0
    refused: int = 0
    bytes_in: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _accepted: Counter[str] = field(default_factory=Counter, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds."""
        values = {**vars(self), "tensors": sorted(self.tensors), "reasons": dict(self.reasons)}
        del values["_accepted"]
        return values

    def add(self, values: Mapping[str, Any]) -> None:
        """Counts one record."""
        self.first = self.first or values["time"]
        self.last = values["time"]
        self.run = self.run or str(values.get("run", ""))
        outcome = values["outcome"]
        if outcome != SENT and values["reason"]:
            self.reasons[values["reason"]] += 1
        if values["direction"] == IN:
            self._add_arrived(values)
        elif outcome == BLOCKED:
            self.blocked += 1
        else:
            self._add_sent(values)

    def _add_arrived(self, values: Mapping[str, Any]) -> None:
        """A message that the filters accepted may be refused later, in a line of its own."""
        sha256 = str(values.get("sha256", ""))
        if values["outcome"] == ACCEPTED:
            self.received += 1
            self._accepted[sha256] += 1
        else:
            self.refused += 1
            if self._accepted[sha256]:
                self._accepted[sha256] -= 1
                self.received -= 1
                return
        self.bytes_in += values["bytes"]

    def _add_sent(self, values: Mapping[str, Any]) -> None:
        self.bytes_out += values["bytes"]
        if values.get("return_code", "OK") in ("", "OK"):
            self.sent += 1
        else:
            self.errors += 1
        for tensor in values["tensors"]:
            self.tensors.add(tensor["name"])
            norm = tensor.get("norm")
            if isinstance(norm, (int, float)):
                self.largest_norm = max(self.largest_norm or 0.0, float(norm))


@dataclass(frozen=True)
class AuditSummary:
    """The audit file in short.

    Attributes:
        path: the file.
        lines: its lines.
        first_broken: number, from 1, of the first line that does not follow the one before it;
            None if the chain is whole.
        unreadable: numbers of the lines that are no record, as a crash leaves them.
        last_sha256: SHA-256 of the last line.
        jobs: by job, in the order of their first message.
    """

    path: Path
    lines: int
    first_broken: int | None
    unreadable: tuple[int, ...]
    last_sha256: str
    jobs: tuple[JobSummary, ...]

    @property
    def intact(self) -> bool:
        """Whether every line follows the one before it."""
        return self.first_broken is None

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds."""
        return {
            "file": str(self.path),
            "lines": self.lines,
            "chain": "intact" if self.intact else "broken",
            "first_broken": self.first_broken,
            "unreadable": list(self.unreadable),
            "last_sha256": self.last_sha256,
            "jobs": [job.to_dict() for job in self.jobs],
        }


def summary(kit: Path, job: str = "") -> AuditSummary:
    """Reads the audit file of a startup kit, and checks its chain from the first line.

    Args:
        kit: the site's startup kit.
        job: sums up this job alone; the chain is always checked whole.

    Raises:
        AuditError: if there is no audit file, or it can't be read.
    """
    path = audit_path(kit)
    jobs: dict[str, JobSummary] = {}
    before: list[bytes] = []  # the last record, and what a crash left after it
    broken, unreadable, number = None, [], 0
    for line, values in read_lines(path):
        number += 1
        if values is None:
            unreadable.append(number)
            before.append(line)
            continue
        if values[PREVIOUS] != _sum_of(before) and broken is None:
            broken = number
        if job in ("", values["job"]):
            jobs.setdefault(values["job"], JobSummary(values["job"])).add(values)
        before = [line]
    last = _sum_of(before)
    return AuditSummary(path, number, broken, tuple(unreadable), last, tuple(jobs.values()))


def _sum_of(lines: list[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest() if lines else START


def render(found: AuditSummary) -> str:
    """The summary as plain lines for a terminal."""
    lines = [f"{found.path}: {found.lines} lines, last line's SHA-256 {found.last_sha256}"]
    if found.intact:
        lines.append("chain: intact, every line holds the SHA-256 of the line before it")
    else:
        lines.append(
            f"chain: BROKEN at line {found.first_broken}: the line before it was changed, or lines "
            "were taken out or put in there"
        )
    if found.unreadable:
        shown = ", ".join(map(str, found.unreadable[:10]))
        lines.append(f"unreadable lines: {shown} (a crash while writing leaves such a line)")
    for job in found.jobs:
        lines += _job_lines(job)
    return "\n".join(lines)


def _job_lines(job: JobSummary) -> list[str]:
    norm = "none" if job.largest_norm is None else f"{job.largest_norm:.6g}"
    lines = [
        f"job {job.job}" + (f", run {job.run}" if job.run else ""),
        f"  {job.first} to {job.last}",
        f"  out: {job.sent} messages sent, {job.errors} error replies, {job.bytes_out:,} bytes; "
        f"{job.blocked} blocked",
        f"  in:  {job.received} messages accepted, {job.refused} refused, {job.bytes_in:,} bytes",
        f"  tensors that left: {len(job.tensors)}, largest norm {norm}",
    ]
    lines += [f"    {count} x stopped: {reason}" for reason, count in sorted(job.reasons.items())]
    return lines
