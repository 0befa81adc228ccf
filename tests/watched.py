"""What this process does to files, processes and the network while a test watches it.

Python's own audit events (PEP 578): everything that goes through Python is seen, whatever library
it is in; safetensors' own reader opens its files without Python and is not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod")
_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Seen:
    """Events of one watch.

    Attributes:
        read: paths that were opened.
        written: paths that were opened to write, made, moved or removed.
        run: events by which code outside this process runs.
    """

    read: list[Path] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    run: list[str] = field(default_factory=list)

    def outside(self, *folders: Path) -> list[Path]:
        """Written paths that lie in none of the folders."""
        return [path for path in self.written if not _lies_in(path, folders)]


_watch: list[Seen] = []


@contextmanager
def watched() -> Iterator[Seen]:
    """Records until the block ends."""
    seen = Seen()
    _watch.append(seen)
    try:
        yield seen
    finally:
        _watch.remove(seen)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watch:
        return
    if event.startswith(_RUNS):
        _watch[-1].run.append(f"{event} {args[:2]}")
    elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = Path.cwd() / os.fsdecode(args[0])
        _watch[-1].read.append(path)
        if isinstance(args[2], int) and args[2] & _WRITE:
            _watch[-1].written.append(path)
    elif event in _CHANGES:
        paths = [one for one in args[:2] if isinstance(one, (str, bytes, os.PathLike))]
        _watch[-1].written += [Path.cwd() / os.fsdecode(one) for one in paths]


def _lies_in(path: Path, folders: tuple[Path, ...]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)


sys.addaudithook(_hook)
