"""A bounded folder on the site's own disk for what is made from its scans.

Files are named by hashes, never by cases, and only their owner may read them. A file appears whole
or not at all, so several processes may share the folder. Reading finds nothing where a file is
gone; a full or broken disk ends the writing, never the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Store:
    """Bytes by name, within a bound.

    The files longest unused make room for new ones, except those used since this store was
    opened: a site with more cases than fit keeps some of them on disk, instead of none by the
    time the next process starts from the first again.

    Args:
        folder: made when first written to; None keeps nothing.
        limit: bytes that all files in the folder may take together.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._opened = time.time_ns()
        self._writes = folder is not None
        self._granted = 0

    def read(self, name: str) -> bytes | None:
        """What was written under `name`; None if it is not there or cannot be read."""
        if self._folder is None:
            return None
        path = self._folder / name
        try:
            data = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read
            _touch(path)
        return data

    def write(self, name: str, data: bytes) -> bool:
        """Keeps `data`, if there is room, and says whether; logs once if there is none."""
        if self._folder is None or not self._writes:
            return False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._make_room(len(data)):
                self._stop(f"holds no more than {self._limit / 1e9:g} GB (cache_gb)")
                return False
            _place(self._folder / name, data)
        except OSError as error:
            self._stop(f"cannot be written ({error.strerror})")
            return False
        return True

    def drop(self, name: str) -> None:
        """Removes a file that turned out to be damaged."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)

    def _make_room(self, needed: int) -> bool:
        """Removes the files longest unused until `needed` bytes fit; False if they cannot.

        The folder is looked through only when an eighth of the room found last is used up: it
        may hold a hundred thousand files, and other processes write to it as well.
        """
        assert self._folder is not None
        self._granted -= needed
        if self._granted >= 0:
            return True
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        room = self._limit - sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            if room >= needed or used >= self._opened:
                break
            path.unlink(missing_ok=True)
            room += size
        self._granted = max(0, room - needed) // 8
        return room >= needed

    def _stop(self, why: str) -> None:
        self._writes = False
        logger.warning("the cache %s %s: what else is made stays in memory", self._folder, why)


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the tensors' bytes, one after the other.

    For what is kept: a safetensors header only knows how long its file should be.
    """
    result = 0
    for tensor in tensors:
        array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        result = zlib.crc32(array, result)
    return result


def _place(path: Path, data: bytes) -> None:
    """Puts `data` at `path`, whole or not at all, for its owner's eyes."""
    handle, beside = mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        _touch(Path(beside))
        Path(beside).replace(path)
    except OSError:
        Path(beside).unlink(missing_ok=True)
        raise


def _touch(path: Path) -> None:
    # By the clock that `_opened` was read from; the file system's own may lag behind it.
    now = time.time_ns()
    os.utime(path, ns=(now, now))
