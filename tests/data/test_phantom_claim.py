"""Who may write into a folder when several processes reach for it at the same moment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flap_nvflare.data import phantom_files
from flap_nvflare.data.kits import MANIFEST, DataError
from flap_nvflare.data.phantom import VERSION, write_phantom

OURS = {"synthetic": True, "version": VERSION, "seed": 0}


def test_a_process_that_was_slower_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest appears after it was looked for and before the folder is listed."""
    listed = Path.iterdir

    def late(folder: Path) -> Iterator[Path]:
        (folder / MANIFEST).write_text(json.dumps(OURS))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    write_phantom(tmp_path / "kits", sites=[])
    assert json.loads((tmp_path / "kits" / MANIFEST).read_text()) == OURS


def test_the_faster_process_chooses_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = phantom_files.place

    def late(path: Path, data: bytes, only_if_missing: bool = False) -> None:
        if path.name == MANIFEST:
            path.write_text(json.dumps({**OURS, "seed": 9}))
        placed(path, data, only_if_missing)

    monkeypatch.setattr(phantom_files, "place", late)
    with pytest.raises(DataError, match="'seed': 9"):
        write_phantom(tmp_path, sites=[])
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_file_system_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write_phantom(tmp_path, sites=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "thresholded_sites.csv"]


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_seed_that_is_none_is_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(DataError, match="seed"):
        write_phantom(tmp_path / "kits", seed=seed)
    assert not (tmp_path / "kits").exists()
