"""Values of JSON that anybody may have written: read as what they should be, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MOST_BYTES = 256 * 2**20  # of one file of JSON
_LARGEST = 1e15  # of what a run counts or measures
NAME_LENGTH = 24  # characters of a name that are shown


class ReportError(ValueError):
    """A folder or a file is no run's; the message names it and the mend."""


def number(value: Any) -> float | None:
    """A finite number of a size that occurs, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) <= _LARGEST else None


def count(value: Any) -> int:
    """A whole number of zero or more; 0 for everything else."""
    found = number(value)
    return int(found) if found is not None and found >= 0 else 0


def share(value: Any) -> float | None:
    """A number from 0 to 1, else None."""
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def mapping(value: Any) -> dict[str, Any]:
    """A dictionary, empty if it is none."""
    return value if isinstance(value, dict) else {}


def rows(value: Any) -> list[dict[str, Any]]:
    """The dictionaries of a list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def texts(value: Any) -> list[str]:
    """The texts of a list."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def shown(value: Any, most: int = NAME_LENGTH) -> str:
    """At most so many characters of a text, with "…" where it is cut.

    What is not printable becomes "?": line ends, and marks that turn the direction of writing.
    """
    text = value if isinstance(value, str) else ("" if value is None else str(value))
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of those that are there; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a file, empty if there is no file.

    Raises:
        ReportError: if the file is too large, or holds no dictionary.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: no JSON ({error}); restore the file or remove it") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: holds a {type(value).__name__}; expected names with values")
    return value


def read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The dictionaries of a file of JSON lines up to the first broken one, and whether one is.

    Raises:
        ReportError: if the file is too large.
    """
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found, False
    for line in read_text(path).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return found, True
        if not isinstance(value, dict):
            return found, True
        found.append(value)
    return found, False


def read_text(path: Path) -> str:
    """A file's text; bytes that are no UTF-8 become marks of that.

    Raises:
        ReportError: if it is too large.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ReportError(f"{path}: {size:,} bytes, at most {_MOST_BYTES:,}; is this a run's?")
    return path.read_text(encoding="utf-8", errors="replace")
