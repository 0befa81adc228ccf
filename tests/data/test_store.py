"""The bounded folder: whole files, the longest unused leave first, a full disk ends no work."""

from __future__ import annotations

import logging
import os
import resource
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from flap_nvflare.data.store import Store


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_by_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    Store(folder, 100).write("ab", b"bytes")
    assert Store(folder, 100).read("ab") == b"bytes"
    assert Store(folder, 100).read("cd") is None
    assert held(folder) == ["ab"]
    Store(folder, 100).drop("ab")
    assert held(folder) == []


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    Store(tmp_path / "cache", 100).write("ab", b"bytes")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "cache" / "ab").stat().st_mode) == 0o600


def test_without_a_folder_nothing_is_kept() -> None:
    store = Store(None, 100)
    store.write("ab", b"bytes")
    store.drop("ab")
    assert store.read("ab") is None


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old"), 1):
        (tmp_path / name).write_bytes(b"x" * 30)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    store = Store(tmp_path, 100)
    assert store.read("old") is not None  # now the newest
    store.write("more", b"x" * 40)
    assert held(tmp_path) == ["more", "new", "old"]


def test_what_is_in_use_stays_and_the_bound_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, 100)
    with caplog.at_level(logging.WARNING):
        for name in "abcd":
            store.write(name, b"x" * 40)
    assert held(tmp_path) == ["a", "b"]
    (line,) = caplog.messages
    assert "cache_gb" in line
    Store(tmp_path, 100).write("e", b"x" * 40)  # a later process may take the place
    assert held(tmp_path) == ["b", "e"]


def test_the_folder_is_not_looked_through_at_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: looks.append(self) or iterdir(self))
    store = Store(tmp_path, 10_000)
    for number in range(100):
        assert store.write(f"{number:02d}", b"x" * 90)
    assert len(looks) < 40
    assert not store.write("more", b"x" * 1001)


@contextmanager
def four_bytes() -> Iterator[None]:
    """No file may grow beyond four bytes, as if the disk were full after them.

    Not a fixture: pytest's own report may go to a file.
    """
    own, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (own, most))


def test_a_full_disk_is_said_once_and_leaves_no_half_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, 100)
    with caplog.at_level(logging.WARNING), four_bytes():
        store.write("ab", b"four")
        store.write("cd", b"bytes")
        store.write("ef", b"four")
    assert held(tmp_path) == ["ab"]
    assert store.read("ab") == b"four"
    (line,) = caplog.messages
    assert "cannot be written (File too large)" in line


def test_two_writers_and_a_reader_see_whole_files(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in (1, 2)]

    def write(data: bytes) -> None:
        store = Store(tmp_path, 10**6)
        for _ in range(40):
            store.write("ab", data)

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, data) for data in contents]
        store = Store(tmp_path, 10**6)
        seen = {store.read("ab")}
        while not all(writer.done() for writer in writers):
            seen.add(store.read("ab"))
        for writer in writers:
            writer.result()
        seen.add(store.read("ab"))
    assert seen <= {None, *contents}
    assert seen & set(contents)
    assert held(tmp_path) == ["ab"]


def test_a_folder_that_cannot_be_made_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "cache", 100)
    with caplog.at_level(logging.WARNING):
        store.write("ab", b"bytes")
        store.write("cd", b"bytes")
    assert store.read("ab") is None
    assert len(caplog.messages) == 1
