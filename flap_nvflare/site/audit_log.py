"""The site's audit file: what left its job processes and what came in, one line of JSON each.

`KIT/flap/audit.jsonl`, mode 600, only ever appended to, on the disk before a message leaves. Each
line holds the SHA-256 of the line before it, the first one zeros:

    previous_n = SHA-256(bytes of line n - 1, without its line end)

What a crash left of a line counts as a part of the line before it. So a line that is changed,
taken out or put in breaks the chain at the line after it. What the chain can't show is an end
that was cut off, or a file that was written anew from its start: keep a copy of the last line's
SHA-256 (`site audit` prints it) where the site's machine can't reach it.

A line names tensors, sizes, sums and outcomes, and holds no value of a tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

FOLDER, FILE = "flap", "audit.jsonl"
START = "0" * 64
FORMAT = 1

# Directions and outcomes.
OUT, IN = "out", "in"
SENT, BLOCKED, ACCEPTED, REFUSED = "sent", "blocked", "accepted", "refused"
PREVIOUS = "previous"
_BLOCK = 1 << 16


class AuditError(OSError):
    """The audit file can't be written or read; then nothing may leave the site."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a message, or its coded or encrypted bytes.

    Attributes:
        name: the tensor's name.
        shape: its sizes; for bytes their number.
        dtype: as torch names it; `bytes` for coded bytes.
        bytes: what its values take.
        sha256: of these bytes.
        norm: L2 norm of its values; None for bytes, or if it is no finite number.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str
    norm: float | None


@dataclass(frozen=True)
class Record:
    """One message.

    Attributes:
        direction: `out` or `in`.
        outcome: `sent` or `blocked` on the way out, `accepted` or `refused` on the way in.
        job: FLARE's id of the job.
        run: the run's name, `job/time`; empty if the message was not of this project.
        round: the round, from 0; -1 where a task has none.
        task: the task's name; `channel/topic` for a message that answers no task.
        peer: who gets it or sent it.
        bytes: the whole message as FLARE serialises it.
        sha256: of these bytes; empty if it can't be serialised.
        return_code: FLARE's, of a reply.
        reason: why it was blocked or refused, or why the site could not do its work.
        filters: classes of the filters that it passed, in their order.
        tensors: what it holds.
    """

    direction: str
    outcome: str
    job: str
    run: str = ""
    round: int = -1
    task: str = ""
    peer: str = ""
    bytes: int = 0
    sha256: str = ""
    return_code: str = ""
    reason: str = ""
    filters: tuple[str, ...] = ()
    tensors: tuple[TensorRecord, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds."""
        values = dict(vars(self))
        values["filters"] = list(self.filters)
        values["tensors"] = [{**vars(one), "shape": list(one.shape)} for one in self.tensors]
        return values


def audit_path(kit: Path) -> Path:
    """The audit file of a startup kit."""
    return kit / FOLDER / FILE


class AuditLog:
    """Appends records to a kit's audit file; several processes of the site may do so at once.

    Args:
        kit: the site's startup kit.
    """

    def __init__(self, kit: Path) -> None:
        self.path = audit_path(kit)

    def append(self, record: Record) -> str:
        """Writes the record and has it on the disk when it returns.

        Returns:
            SHA-256 of the new line.

        Raises:
            AuditError: if that fails, for whatever reason.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=60, mode=0o600):
                return self._append(record)
        except Exception as error:  # no failure here may let a message pass unrecorded
            raise AuditError(
                f"{self.path}: {type(error).__name__}: {error}; nothing leaves the site until it "
                "can be written"
            ) from error

    def _append(self, record: Record) -> str:
        fresh = not self.path.exists()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(self.path, flags, 0o600)
        try:
            state = os.fstat(file)
            if not stat.S_ISREG(state.st_mode):
                raise OSError("it is no plain file")
            if stat.S_IMODE(state.st_mode) != 0o600:
                os.fchmod(file, 0o600)
            last, whole = _last_record(file, state.st_size)
            values = {
                "format": FORMAT,
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                **record.to_dict(),
                PREVIOUS: START if last is None else hashlib.sha256(last).hexdigest(),
            }
            line = json.dumps(values, allow_nan=False, separators=(",", ":")).encode()
            # A line that a crash has cut off stays, as a line of its own that nobody can read.
            content = (b"" if whole else b"\n") + line + b"\n"
            while content:
                content = content[os.write(file, content) :]
            os.fsync(file)
        finally:
            os.close(file)
        if fresh:
            _sync_folder(self.path.parent)
        return hashlib.sha256(line).hexdigest()


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of an audit file and what they say; None for one that is no record.

    Raises:
        AuditError: if there is no such file or it can't be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.rstrip(b"\n"), _parsed(line)
    except OSError as error:
        raise AuditError(
            f"{path}: {error.strerror}; a site writes it once its first job has run"
        ) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and _is_record(values) else None


_TEXTS = ("time", "direction", "outcome", "job", "task", "reason", PREVIOUS)


def _is_record(values: Mapping[str, Any]) -> bool:
    tensors = values.get("tensors")
    return (
        all(isinstance(values.get(name), str) for name in _TEXTS)
        and isinstance(values.get("bytes"), int)
        and isinstance(tensors, list)
        and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in tensors)
    )


def _last_record(file: int, size: int) -> tuple[bytes | None, bool]:
    """From the start of the last record to the file's end, and whether that is a line end.

    The bytes are those that the next line's sum is taken of; None if the file is empty.
    """
    if size == 0:
        return None, True
    whole = os.pread(file, 1, size - 1) == b"\n"
    start = end = size - 1 if whole else size
    tail = b""
    while start > 0:
        step = min(_BLOCK, start)
        start -= step
        tail = os.pread(file, step, start) + tail
        lines = tail.split(b"\n")
        for index in range(len(lines) - 1, 0, -1):  # the first may have begun before
            if _parsed(lines[index]) is not None:
                return b"\n".join(lines[index:]), whole
    return tail[:end], whole


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
