"""Slices with truth and prediction, put into the page itself."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from flap_nvflare.report.read import Run
from flap_nvflare.report.values import rows, shown

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_PICTURES = 24
_MOST_BYTES = 4 * 2**20  # of one picture


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its caption."""

    uri: str
    caption: str


def pictures(run: Run) -> tuple[list[Picture], list[str]]:
    """The evaluation's pictures, and what stands in the place of those that can't be shown."""
    found, faults = [], []
    listed = rows(run.evaluation.get("pictures"))
    for one in listed[:_MOST_PICTURES]:
        caption = ", ".join(
            (
                f"site {shown(one.get('site'))}",
                shown(one.get("case")),
                f"slice {shown(one.get('slice'))}",
                f"model {shown(one.get('model'))}",
            )
        )
        name = one.get("file")
        data = _png(run.path, name) if isinstance(name, str) else None
        if data is None:
            faults.append(f"{shown(name, 60)}: no PNG of at most 4 MB in the run's folder")
        else:
            found.append(
                Picture("data:image/png;base64," + base64.b64encode(data).decode(), caption)
            )
    if len(listed) > _MOST_PICTURES:
        faults.append(f"{len(listed) - _MOST_PICTURES} more are in the run's folder")
    return found, faults


def _png(folder: Path, name: str) -> bytes | None:
    """The file's bytes; None if it lies outside the folder, is too large, or is no PNG."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        if path.stat().st_size > _MOST_BYTES:
            return None
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    return data if data.startswith(_PNG) else None
