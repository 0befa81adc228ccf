from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flap_nvflare.sam.backbone import Architecture, StockSam
from flap_nvflare.sam.checkpoint import (
    PACKAGED,
    CheckpointError,
    fit_tables,
    read_checkpoint,
    recognise_checkpoint,
)

POS = "image_encoder.pos_embed"
GLOBAL = "image_encoder.blocks.1.attn.rel_pos_h"
WINDOW = "image_encoder.blocks.0.attn.rel_pos_h"


class Bomb:
    """Would write a file if it were unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.target, "w")


@pytest.fixture
def state(tiny_stock: StockSam) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tiny_stock.state_dict().items()}


def _refusal(path: Path, arch: Architecture) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, arch)
    assert str(path) in str(caught.value)
    assert "download" in str(caught.value)
    return str(caught.value)


def test_reads_both_formats_alike(
    tiny: Architecture, tiny_file: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "tiny.safetensors")
    one, first = read_checkpoint(tiny_file, tiny)
    two, second = read_checkpoint(tmp_path / "tiny.safetensors", tiny)
    assert all(torch.equal(one[name], two[name]) for name in state)
    assert first != second  # identity of the file, not of the numbers


def test_half_precision_is_read_as_float32(
    tiny: Architecture, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({n: t.half() for n, t in state.items()}, tmp_path / "tiny.safetensors")
    read, _ = read_checkpoint(tmp_path / "tiny.safetensors", tiny)
    assert {t.dtype for t in read.values()} == {torch.float32}


def test_missing_file(tiny: Architecture, tmp_path: Path) -> None:
    assert "no such file" in _refusal(tmp_path / "none.pth", tiny)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(
    tiny: Architecture, state: dict[str, Tensor], tmp_path: Path, suffix: str, share: float
) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "cut short" in _refusal(path, tiny)


def test_code_in_a_file_is_never_run(tiny: Architecture, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    plain, zipped = tmp_path / "plain.pth", tmp_path / "zipped.pth"
    plain.write_bytes(pickle.dumps(Bomb(str(target)), protocol=2))
    torch.save({"image_encoder.pos_embed": Bomb(str(target))}, zipped)
    for path in (plain, zipped):
        assert "holds more than tensors" in _refusal(path, tiny)
    assert not target.exists()


def test_other_architecture_is_named(tiny: Architecture, tmp_path: Path) -> None:
    stock = {
        "image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16),
        **{f"image_encoder.blocks.{k}.norm1.weight": torch.zeros(768) for k in range(12)},
    }
    torch.save(stock, tmp_path / "b.pth")
    assert "holds vit_b, not tiny" in _refusal(tmp_path / "b.pth", tiny)


def test_missing_and_unknown_keys(
    tiny: Architecture, state: dict[str, Tensor], tmp_path: Path
) -> None:
    tensor = state.pop("mask_decoder.iou_token.weight")
    torch.save(state, tmp_path / "less.pth")
    assert "lacks 'mask_decoder.iou_token.weight'" in _refusal(tmp_path / "less.pth", tiny)
    torch.save({**state, "mask_decoder.iou_token.weight": tensor, "x.y": tensor}, tmp_path / "more")
    assert "unknown 'x.y'" in _refusal(tmp_path / "more", tiny)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mask_decoder.iou_token.weight", torch.zeros(1, 31), "shape"),
        (WINDOW, torch.zeros(7, 8), "shape"),
        (POS, torch.zeros(4, 4, 16), "shape"),
        (POS, torch.zeros(1, 4, 1, 16), "shape"),  # would broadcast in silence
        (POS, torch.zeros(2, 4, 4, 16), "shape"),
        (POS, torch.zeros(1, 0, 0, 16), "shape"),
        (GLOBAL, torch.zeros(0, 8), "shape"),
        (GLOBAL, torch.zeros(6, 8), "shape"),  # 2 grid - 1 is odd
        ("image_encoder.patch_embed.proj.weight", torch.zeros(()), "shape"),
        ("mask_decoder.iou_token.weight", torch.full((1, 32), float("nan")), "finite"),
        ("mask_decoder.iou_token.weight", torch.zeros(1, 32, dtype=torch.int64), "finite"),
    ],
)
def test_wrong_tensors(
    tiny: Architecture,
    state: dict[str, Tensor],
    tmp_path: Path,
    name: str,
    value: Tensor,
    said: str,
) -> None:
    torch.save({**state, name: value}, tmp_path / "odd.pth")
    message = _refusal(tmp_path / "odd.pth", tiny)
    assert said in message
    assert name in message


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {1: torch.zeros(2)}, torch.zeros(2)])
def test_no_table_of_tensors(tiny: Architecture, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pth")
    assert "no table" in _refusal(tmp_path / "odd.pth", tiny)


def test_tables_stay_at_the_native_size(tiny: Architecture, state: dict[str, Tensor]) -> None:
    fitted = fit_tables(state, tiny, 64)
    assert all(fitted[name] is state[name] for name in state)


def test_tables_are_resized(tiny: Architecture, state: dict[str, Tensor]) -> None:
    state[POS] = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 4, 4, 16)  # rises with the column
    state[GLOBAL] = torch.arange(7.0)[:, None].expand(7, 8)
    fitted = fit_tables(state, tiny, 32)  # grid 4 -> 2, relative table 7 -> 3
    assert fitted[POS][0, 0, :, 0].tolist() == [0.5, 2.5]
    assert fitted[POS].shape == (1, 2, 2, 16)
    torch.testing.assert_close(fitted[GLOBAL][:, 0], torch.tensor([2 / 3, 3.0, 16 / 3]))
    assert fitted[WINDOW] is state[WINDOW]


def test_a_file_tells_whose_weights_it_holds(tiny_file: str, tmp_path: Path) -> None:
    assert recognise_checkpoint(PACKAGED) == "vit_t"
    with pytest.raises(CheckpointError, match="no SAM encoder"):  # nor any known one
        recognise_checkpoint(tiny_file)
    with pytest.raises(CheckpointError, match="no such file"):
        recognise_checkpoint(tmp_path / "none.pth")
