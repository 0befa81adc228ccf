"""Files that appear whole or not at all, for whoever may read the folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def place(path: Path, data: bytes, only_if_missing: bool = False) -> None:
    """Writes a file at once, never in part; makes the folders above it.

    Args:
        path: the file, which all may read.
        data: its contents.
        only_if_missing: whether a file that is there stays as it is.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        part.chmod(0o644)
        if only_if_missing:
            _link(part, path)
        else:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _link(part: Path, path: Path) -> None:
    try:
        path.hardlink_to(part)
    except FileExistsError:
        pass  # another process was faster
    except OSError:
        part.replace(path)  # a file system without hard links
