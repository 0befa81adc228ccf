"""What a check of a site found, and how a check that breaks becomes a finding as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was looked at, in a few words.
        ok: whether it is as it must be; None where nothing could be said.
        found: what is there; for None, why nothing could be said.
        mend: what to do about it; empty where nothing is to be done.

    Raises:
        ValueError: if a failure comes without a mend: it would leave its reader alone.
    """

    name: str
    ok: bool | None
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        if self.ok is False and not self.mend:
            raise ValueError(f"finding {self.name!r} failed and names no mend; say what to do")

    @property
    def verdict(self) -> str:
        """`ok`, `fail` or `skipped`."""
        return {True: "ok", False: "fail", None: "skipped"}[self.ok]


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of one check; whatever it raises is a failed finding under `name`."""
    findings = []
    try:
        for finding in check():
            findings.append(finding)
    except Exception as error:  # a broken machine can make anything raise
        findings.append(of_error(name, error))
    return findings


def of_error(name: str, error: Exception) -> Finding:
    """A failed finding out of an exception.

    This package's errors end in "; " and the mend.
    """
    text = " ".join(str(error).split())
    if isinstance(error, PermissionError):
        mend = "run as the user that runs FLARE, or give that user the right to read it"
        return Finding(name, False, text, mend)
    mend = "mend what the message names, then run the doctor again"
    if not type(error).__module__.startswith("flap_nvflare."):
        return Finding(name, False, f"{type(error).__name__}: {text}", mend)
    found, semicolon, own = text.rpartition("; ")
    return Finding(name, False, found if semicolon else text, own if semicolon else mend)


def size(count: float) -> str:
    """Bytes as a person reads them: `375 MB`."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= bytes_:
            return f"{count / bytes_:.3g} {unit}"
    return f"{count:.0f} B"
