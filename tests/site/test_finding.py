"""A finding says what to do; whatever a check raises becomes one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flap_nvflare.data.errors import DataError
from flap_nvflare.site.finding import Finding, guarded, size


def broken(error: Exception) -> Iterator[Finding]:
    yield Finding("first", True, "as it should be")
    raise error


def test_a_failure_needs_a_mend() -> None:
    with pytest.raises(ValueError, match="names no mend"):
        Finding("disk", False, "full")


def test_verdicts() -> None:
    verdicts = [Finding("a", ok, "", "do").verdict for ok in (True, False, None)]
    assert verdicts == ["ok", "fail", "skipped"]


@pytest.mark.parametrize(
    ("error", "found", "mend"),
    [
        (DataError("x.nii: damaged; copy it again"), "x.nii: damaged", "copy it again"),
        (DataError("x.nii: damaged"), "x.nii: damaged", "mend what the message names"),
        (ZeroDivisionError("a; b"), "ZeroDivisionError: a; b", "mend what the message names"),
        (PermissionError(13, "denied", "k"), "[Errno 13] denied: 'k'", "run as the user"),
    ],
)
def test_an_exception_ends_its_check_alone(error: Exception, found: str, mend: str) -> None:
    first, second = guarded("scans", lambda: broken(error))
    assert first.ok is True
    assert (second.name, second.ok, second.found) == ("scans", False, found)
    assert second.mend.startswith(mend)


def test_sizes_as_they_are_read() -> None:
    shown = [size(count) for count in (0, 999, 3_250_000, 375e6, 2.5e9)]
    assert shown == ["0 B", "999 B", "3.25 MB", "375 MB", "2.5 GB"]
