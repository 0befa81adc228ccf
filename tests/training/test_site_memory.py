"""Files by round: only whole rounds count, and two are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flap_nvflare.training.errors import StateError
from flap_nvflare.training.site_memory import CONTROL, MOMENTS, PRIVATE, SiteMemory

HEAD = {"head": torch.arange(3.0)}
SHAPES = {"head": (3,)}


def finish(memory: SiteMemory, round_index: int) -> None:
    memory.begin(round_index)
    memory.write(PRIVATE, round_index, {"head": HEAD["head"] + round_index})
    memory.write(MOMENTS, round_index, {})
    memory.finish(round_index)


def names(memory: SiteMemory) -> list[str]:
    return [path.name.removesuffix(".safetensors") for path in memory.files()]


def test_two_rounds_are_kept_whichever_they_were(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path / "deep" / "folder")
    assert memory.last(5) is None
    for index in (0, 3, 7):
        finish(memory, index)
    assert names(memory) == ["moments_3", "moments_7", "private_3", "private_7"]
    assert [memory.last(before) for before in (3, 4, 7, 8, 100)] == [None, 3, 3, 7, 7]
    kept = memory.read(PRIVATE, 7, SHAPES)
    assert kept is not None
    assert kept["head"].tolist() == [7, 8, 9]
    assert memory.read(CONTROL, 7, SHAPES) is None


def test_a_round_broken_off_does_not_count(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path)
    finish(memory, 0)
    memory.begin(1)
    memory.write(PRIVATE, 1, HEAD)
    assert SiteMemory(tmp_path).last(2) == 0
    finish(memory, 1)
    memory.begin(1)  # done once more
    assert SiteMemory(tmp_path).last(2) == 0


def test_a_round_done_again_forgets_those_after_it(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path)
    for index in (0, 1, 2):
        finish(memory, index)
    finish(memory, 1)
    assert memory.last(9) == 1


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path)
    for name in ("adapter.safetensors", "moments_1.txt", "moments_x.safetensors"):
        (tmp_path / name).write_bytes(b"")
    for index in range(4):
        finish(memory, index)
    assert len(list(tmp_path.iterdir())) == 3 + 2 * 2


@pytest.mark.parametrize("shapes", [{"head": (4,)}, {"other": (3,)}, {**SHAPES, "other": (1,)}])
def test_a_file_of_other_settings_is_named(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    memory = SiteMemory(tmp_path)
    memory.write(PRIVATE, 0, HEAD)
    with pytest.raises(StateError, match=r"private_0\.safetensors: \w+ is .* delete the file"):
        memory.read(PRIVATE, 0, shapes)
    memory.path(CONTROL, 0).write_bytes(memory.path(PRIVATE, 0).read_bytes())
    with pytest.raises(StateError, match="not a file of"):
        memory.read(CONTROL, 0, SHAPES)


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path)
    both = {"b": torch.ones(2), "a": torch.zeros(1)}
    memory.write(PRIVATE, 0, both)
    memory.write(PRIVATE, 1, dict(sorted(both.items())))
    assert memory.path(PRIVATE, 0).read_bytes() == memory.path(PRIVATE, 1).read_bytes()
