"""The picture: which slices, which colours, bytes that are a PNG, for its owner's eyes."""

from __future__ import annotations

import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from flap_nvflare.data.volume import Volume
from flap_nvflare.site.doctor_picture import picture, png, slices_to_show, write_picture


def decoded(data: bytes) -> np.ndarray:
    """Pixels of a PNG as `png` writes it, read by the format's own rules."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, parts = 8, {}
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        (crc,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert crc == zlib.crc32(body)
        parts[body[:4]] = body[4:]
        place += 12 + length
    columns, rows, depth, colour = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    assert (depth, colour) == (8, 2)
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(rows, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, 3)


def volume(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    image = np.arange(9 * 8 * 10, dtype=np.float32).reshape(9, 8, 10)
    label = np.zeros((9, 8, 10), np.uint8)
    label[3:8, 2:4, 5:7] = 1
    label[5, 2, 5] = 2
    return Volume("case", image, label, spacing)


def test_slices_are_spread_over_the_foreground() -> None:
    label = np.zeros((20, 2, 2), np.uint8)
    label[8:16, 0, 0] = 1
    assert slices_to_show(label) == [10, 12, 14]
    assert slices_to_show(label[:9]) == [8]
    assert slices_to_show(np.zeros((4, 2, 2))) == [1, 2, 3]


def test_masks_are_tinted_below_and_nothing_else() -> None:
    pixels = picture(volume())
    assert pixels.shape == (8 + 6 + 8, 10 * 3 + 6 * 2, 3)
    above, below = pixels[:8, :10].astype(int), pixels[14:, :10].astype(int)
    marked = np.zeros((8, 10), bool)
    marked[2:4, 5:7] = True
    assert np.array_equal(above[~marked], below[~marked])
    red = below[marked] - above[marked]
    assert (red[:, 0] > red[:, 2]).all()
    assert (above[:, :, 0] == above[:, :, 2]).all()


def test_pixels_are_square_in_mm() -> None:
    pixels = picture(volume(spacing=(5.0, 2.0, 1.0)))  # 16 mm high, 10 mm wide
    height = (pixels.shape[0] - 6) / 2
    width = (pixels.shape[1] - 12) / 3
    assert height / width == pytest.approx(1.6, abs=0.1)


def test_png_holds_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decoded(png(pixels)), pixels)


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "flap" / "doctor.png"
    path.parent.mkdir(mode=0o755)
    path.write_text("an old one")
    path.chmod(0o644)
    write_picture(path, np.zeros((2, 2, 3), np.uint8))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    new = tmp_path / "new" / "doctor.png"
    write_picture(new, np.zeros((2, 2, 3), np.uint8))
    assert stat.S_IMODE(new.parent.stat().st_mode) == 0o700
