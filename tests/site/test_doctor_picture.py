"""The doctor's picture: plain above, masked below, for its owner's eyes."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
from PIL import Image

from flap_nvflare.data.planes import COLOURS
from flap_nvflare.data.volume import Volume
from flap_nvflare.site.doctor_picture import write_picture

SIDE = 400
TOP, GAP = 24, 8  # pixels above a row, and between panels


def volume(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    image = np.tile(np.linspace(0, 100, SIDE, dtype=np.float32), (9, SIDE, 1))
    label = np.zeros((9, SIDE, SIDE), np.uint8)
    label[3:8, 100:200, 150:250] = 1
    return Volume("case", image, label, spacing)


def drawn(folder: Path, of: Volume) -> np.ndarray:
    write_picture(folder / "a.png", of, ["kidney"])
    return np.asarray(Image.open(folder / "a.png"))


def test_masks_are_tinted_below_and_nothing_else(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, volume())
    assert pixels.shape[1] == 3 * (SIDE + GAP) + GAP  # three slices
    below = 2 * TOP + SIDE + GAP
    plain = pixels[TOP : TOP + SIDE, GAP : GAP + SIDE].astype(int)
    masked = pixels[below : below + SIDE, GAP : GAP + SIDE].astype(int)
    marked = volume().label[4] > 0
    assert np.array_equal(plain[~marked], masked[~marked])
    assert (plain[:, :, 0] == plain[:, :, 2]).all()
    assert (masked[marked][:, 0] > masked[marked][:, 2]).all()
    assert (masked[100, 150:250] == COLOURS[0]).all()
    assert plain[0, 0, 0] < plain[0, -1, 0]  # left is left


def test_pixels_are_square_in_mm(tmp_path: Path) -> None:
    tall = drawn(tmp_path, volume(spacing=(5.0, 2.0, 1.0)))
    assert tall.shape[1] == 3 * (SIDE // 2 + GAP) + GAP


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "flap" / "doctor.png"
    path.parent.mkdir(mode=0o755)
    path.write_text("an old one")
    path.chmod(0o644)
    write_picture(path, volume(), [])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    new = tmp_path / "new" / "doctor.png"
    write_picture(new, volume(), [])
    assert stat.S_IMODE(new.parent.stat().st_mode) == 0o700
