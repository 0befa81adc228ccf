"""Three slices of a scan with their masks as a PNG, for the eyes of whoever knows the patients.

No check sees that a mask lies on the wrong organ or that left and right are swapped. PNG is
written here with zlib alone, so that the picture needs no other library.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np

from flap_nvflare.data.planes import LARGEST, square, tinted
from flap_nvflare.data.volume import Volume

_GAP = 6


def slices_to_show(label: np.ndarray, count: int = 3) -> list[int]:
    """Slices spread over those that show foreground, or over all where none does.

    Args:
        label: (S, H, W).
        count: how many; fewer if there are no more.
    """
    shown = np.flatnonzero(label.any(axis=(1, 2)))
    among = shown if shown.size else np.arange(label.shape[0])
    places = (np.arange(1, count + 1) * among.size) // (count + 1)
    return sorted({int(among[place]) for place in places})


def picture(volume: Volume) -> np.ndarray:
    """The slices side by side, above as they are, below with their masks in colour.

    Returns:
        (rows, columns, 3) uint8; up is the patient's front, left the patient's right.
    """
    low, high = np.percentile(volume.image, (1, 99.5))
    columns = []
    for number in slices_to_show(volume.label):
        image, label = (
            square(a[number], volume.spacing[1:], LARGEST) for a in (volume.image, volume.label)
        )
        grey = np.clip((image - low) / max(float(high - low), 1e-6), 0, 1) * 255
        plain = np.repeat(grey[:, :, None], 3, axis=2)
        gap = np.full((_GAP, plain.shape[1], 3), 255.0)
        columns.append(np.concatenate([plain, gap, tinted(plain, label)]))
        columns.append(np.full((columns[-1].shape[0], _GAP, 3), 255.0))
    return np.concatenate(columns[:-1], axis=1).astype(np.uint8)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes (rows, columns, 3) uint8 as PNG that only its owner may read."""
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700, parents=True)
        _give(path.parent)
    # A file that is already there keeps its mode: it is made anew.
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(png(pixels))
    _give(path)


def png(pixels: np.ndarray) -> bytes:
    """(rows, columns, 3) uint8 as the bytes of a PNG file (ISO/IEC 15948)."""
    rows, columns, _ = pixels.shape
    # Before each row the number of its filter: 0, none.
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _give(path: Path) -> None:
    """What root makes in another's kit is that other's, as whom FLARE runs."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _chunk(kind: bytes, data: bytes) -> bytes:
    checked = kind + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))
