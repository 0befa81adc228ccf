"""Device, memory, disk, rights and open files of a machine."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flap_nvflare.settings import Federation
from flap_nvflare.site import doctor_machine
from flap_nvflare.site.doctor_machine import (
    Needs,
    check_device,
    check_disk,
    check_memory,
    check_open_files,
    check_user,
    check_writing,
    existing,
)

SETTINGS = Federation()


def test_needs_are_those_of_the_scans() -> None:
    needs = Needs(slices=100, largest=10, voxels=1000, weights=1e6)
    assert needs.prepared(96) == 100 * 96 * 96 * 5
    assert needs.memory(96) == 1.5e9 + 2e6 + needs.prepared(96) + 5000 + 100


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check_memory(Needs(slices=2), SETTINGS)
    assert finding.ok is True
    assert "2 slices at 96 px" in finding.found
    monkeypatch.setattr("flap_nvflare.sam.runtime.free_memory", lambda device: 1e9)
    (finding,) = check_memory(Needs(slices=2), SETTINGS)
    assert finding.ok is False


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs(slices=1000, voxels=10**9)
    (finding,) = check_disk(tmp_path, needs, SETTINGS, cache_gb=0.05)
    assert finding.ok is True
    assert "50 MB of it cache" in finding.found
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=4e7))
    (finding,) = check_disk(tmp_path, needs, SETTINGS, cache_gb=0.05)
    assert finding.ok is False
    (finding,) = check_disk(tmp_path, needs, SETTINGS, cache_gb=0)
    assert finding.ok is True


def test_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check_writing("state", tmp_path / "a" / "b")
    assert finding.ok is True
    assert finding.found.endswith("can be made")
    assert not (tmp_path / "a").exists()  # it looks, it leaves nothing

    def refuses(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_machine, "TemporaryFile", refuses)
    (finding,) = check_writing("state", tmp_path)
    assert finding.ok is False
    assert "Permission denied" in finding.found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_writing_into_a_closed_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (finding,) = check_writing("state", tmp_path)
    assert finding.ok is False


def test_a_device_that_is_there() -> None:
    (finding,) = check_device("cpu")
    assert finding.ok is True
    assert next(check_device("auto")).ok is True


def test_devices_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (finding,) = check_device("cuda:1")
    assert finding.ok is False
    assert "sees 0 GPUs, 2 are needed" in finding.found
    assert next(check_device("cuda", processes=4)).ok is False
    assert next(check_device("mps")).ok is False


def test_gpus_by_number_and_by_process(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7e10, 8e10))
    (finding,) = check_device("cuda:1")
    assert finding.found == "cuda:1 card 1: 70 GB of 80 GB free"
    assert [f.ok for f in check_device("auto", processes=2)] == [True, True]
    (finding,) = check_device("auto", processes=3)
    assert finding.ok is False


def test_open_files() -> None:
    assert next(check_open_files(least=1)).ok is True
    (finding,) = check_open_files(least=10**12)
    assert finding.ok is False
    assert "ulimit -n" in finding.mend


def test_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(check_user(tmp_path)).ok is True
    monkeypatch.setattr(doctor_machine.os, "geteuid", lambda: 12345)
    (finding,) = check_user(tmp_path)
    assert finding.ok is None


def test_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path
