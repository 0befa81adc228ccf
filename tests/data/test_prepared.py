"""Cases made ready once: what is kept, when it is made again, and what its name tells."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from kits_files import write_case

from flap_nvflare.data import prepared
from flap_nvflare.data.kits import Case, DataError
from flap_nvflare.data.prepared import (
    Prepared,
    PreparedCases,
    case_key,
    read_window,
    window_key,
    write_window,
)
from flap_nvflare.data.store import Store
from flap_nvflare.data.volume import load_volume
from flap_nvflare.data.window import Window, volume_window

WINDOW = Window(-100, 300, 20.5, 60.25)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    draw = np.random.default_rng(0)
    image = draw.integers(-200, 400, (3, 9, 7)).astype(np.int16)
    return write_case(tmp_path / "case_00007", image, draw.integers(0, 3, image.shape, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases whose scans were read."""
    names: list[str] = []
    monkeypatch.setattr(
        prepared, "load_volume", lambda case, count: names.append(case.name) or load_volume(case, 2)
    )
    return names


def prepare(
    case: Case, folder: Path | None, window: Window | None = WINDOW, side: int = 6
) -> Prepared:
    made: Prepared = PreparedCases([case], window, side, 2, Store(folder, 10**6))[0]
    return made


def same(one: Prepared, other: Prepared) -> bool:
    tensors = all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("images", "labels", "mask")
    )
    return tensors and (one.name, one.key, one.shape, one.spacing) == (
        other.name,
        other.key,
        other.shape,
        other.spacing,
    )


def test_the_second_process_reads_no_scan(case: Case, folder: Path, reads: list[str]) -> None:
    first = prepare(case, folder)
    assert reads == ["case_00007"]
    assert same(first, prepare(case, folder))
    assert reads == ["case_00007"]
    assert same(first, prepare(case, None))


def test_what_a_case_holds(case: Case, folder: Path) -> None:
    volume = load_volume(case, 2)
    for made in (prepare(case, folder), prepare(case, folder)):
        assert made.images.shape == made.labels.shape == (3, 6, 6)
        assert (made.images.dtype, made.labels.dtype) == (torch.float32, torch.uint8)
        assert made.native_label().numpy().tolist() == volume.label.tolist()
        assert (made.shape, made.spacing) == (volume.label.shape, volume.spacing)


def test_files_are_named_by_hashes(case: Case, folder: Path) -> None:
    prepare(case, folder)
    store = Store(folder, 10**6)
    write_window(store, window_key([case], 2), WINDOW)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2
    for name in names:
        digest, _, kind = name.partition(".")
        assert kind in ("json", "safetensors")
        assert len(digest) == 64
        assert set(digest) <= set("0123456789abcdef")
    assert not any(b"case_0" in path.read_bytes() for path in folder.iterdir())


def test_every_change_makes_it_anew(
    case: Case, folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {prepare(case, folder).key}
    keys.add(prepare(case, folder, side=5).key)
    keys.add(prepare(case, folder, window=dataclasses.replace(WINDOW, std=60.5)).key)
    keys.add(prepare(case, folder, window=None).key)
    keys.add(PreparedCases([case], WINDOW, 6, 3, Store(folder, 10**6))[0].key)
    for path in (case.image, case.label):
        os.utime(path, ns=(1, 1))
        keys.add(prepare(case, folder).key)
    monkeypatch.setattr(prepared, "VERSION", prepared.VERSION + 1)
    keys.add(prepare(case, folder).key)
    assert len(keys) == len(reads) == 8


def test_without_a_window_a_scan_is_seen_through_its_own(case: Case) -> None:
    found = prepare(case, None, window=None)
    own = volume_window(load_volume(case, 2))
    assert own != WINDOW
    assert torch.equal(found.images, prepare(case, None, window=own).images)
    assert torch.equal(found.labels, prepare(case, None).labels)


@pytest.mark.parametrize("damage", ["cut", "empty", "one byte", "another file"])
def test_a_damaged_file_is_made_again(
    case: Case, folder: Path, reads: list[str], damage: str
) -> None:
    first = prepare(case, folder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "empty": b"",
            "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "another file": b"no tensors at all",
        }[damage]
    )
    assert same(first, prepare(case, folder))
    assert len(reads) == 2
    assert path.read_bytes() == whole


def test_a_bad_scan_is_named_as_ever(case: Case, folder: Path) -> None:
    whole = case.image.read_bytes()
    case.image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"imaging\.nii\.gz: damaged"):
        prepare(case, folder)
    case.image.unlink()
    with pytest.raises(DataError, match=r"imaging\.nii\.gz: no such file"):
        prepare(case, folder)
    assert not folder.exists()


def test_without_room_a_case_stays_in_memory(case: Case, folder: Path, reads: list[str]) -> None:
    for number in (1, 2):
        made = PreparedCases([case], WINDOW, 6, 2, Store(folder, 10))[0]
        assert same(made, prepare(case, None))
        assert len(reads) == 2 * number
    assert list(folder.iterdir()) == []


def test_a_volume_at_hand_is_not_read(case: Case, reads: list[str]) -> None:
    held = {case.name: load_volume(case, 2)}
    made = PreparedCases([case], WINDOW, 6, 2, Store(None, 0), held)[0]
    assert reads == []
    assert held == {}
    assert same(made, prepare(case, None))


def test_a_window_is_kept_to_the_last_digit(case: Case, folder: Path) -> None:
    store, key = Store(folder, 10**6), window_key([case], 2)
    window = Window(-100 / 3, 1e3 / 7, 0.1 + 0.2, 2**0.5)
    assert read_window(store, key) is None
    write_window(store, key, window)
    assert read_window(Store(folder, 10**6), key) == window
    os.utime(case.label, ns=(1, 1))
    assert window_key([case], 2) != key


@pytest.mark.parametrize("text", [b"", b"[1, 2", b"[1, 2, 3]", b"[2, 1, 0, 1]", b'{"a": 1}', b"7"])
def test_a_damaged_window_is_computed_again(case: Case, folder: Path, text: bytes) -> None:
    store, key = Store(folder, 10**6), window_key([case], 2)
    store.write(f"{key}.json", text)
    assert read_window(store, key) is None
    assert list(folder.iterdir()) == []


def test_a_binary_case_is_another_one(case: Case) -> None:
    binary = dataclasses.replace(case, binary=True)
    assert case_key(binary, WINDOW, 6, 2) != case_key(case, WINDOW, 6, 2)
    assert window_key([binary], 2) != window_key([case], 2)
