"""Slices in rows with their masks in colour and a legend, as one PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flap_nvflare.data.planes import (
    COLOURS,
    LARGEST,
    colours_of,
    slices_to_show,
    square,
    tinted,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from flap_nvflare.data.volume import Volume

Panel = tuple[str, np.ndarray, "np.ndarray | None"]

_SMALLEST = 320  # pixels of a panel's longer side: less is hard to look at
_GAP, _LINE, _TEXT = 8, 24, 14  # pixels: between panels, of a line of text, of its letters
_PAPER, _INK = (255, 255, 255), (34, 34, 34)


def panels_of(volume: Volume, name: str) -> list[Panel]:
    """Three slices of a case with their masks, titled with the name and their number."""
    low, high = np.percentile(volume.image, (1, 99.5))
    steps = volume.spacing[1:]
    found: list[Panel] = []
    for number in slices_to_show(volume.label):
        grey = (volume.image[number] - low) / max(float(high - low), 1e-6)
        mask = square(volume.label[number], steps, LARGEST)
        title = f"{name}, slice {number + 1} of {len(volume.label)}"
        found.append((title, square(grey, steps, LARGEST), mask))
    return found


def draw_panels(path: Path | str, panels: Sequence[Panel], class_names: Sequence[str]) -> Path:
    """Writes one row of panels, see `draw_rows`."""
    return draw_rows(path, [panels], class_names)


def draw_rows(
    path: Path | str, rows: Sequence[Sequence[Panel]], class_names: Sequence[str]
) -> Path:
    """Writes the panels of each row from left to right, each under its title, above the colours.

    A mask is tinted and outlined in its class's colour. A panel smaller than 320 pixels is
    enlarged by a whole factor. Only its owner may read the file.

    Args:
        path: the PNG to write, in place of one that is there.
        rows: of each panel title, grey values (H, W) in [0, 1] and class indices (H, W) or None;
            pixels are drawn square, so squeeze planes of other pixels by `data.planes.square`.
        class_names: of the foreground classes, from class 1.

    Raises:
        ValueError: if there is no panel, or a panel's arrays are not (H, W) and alike.
        OSError: if the file cannot be written.
    """
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    if not any(rows):
        raise ValueError(f"{path}: no panel to draw")
    pictures = [[_pixels(*panel) for panel in row] for row in rows]
    tall = [_LINE + max((len(pixels) for pixels in row), default=0) for row in pictures]
    wide = max(sum(pixels.shape[1] + _GAP for pixels in row) + _GAP for row in pictures)
    font = ImageFont.load_default(_TEXT)
    masked = any(panel[2] is not None for row in rows for panel in row)
    marks = _legend(class_names, wide, font) if masked else []
    legend = (marks[-1][0] + 1) * _LINE if marks else 0
    sheet = images.new("RGB", (wide, sum(tall) + len(rows) * _GAP + legend + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, height, drawn in zip(rows, tall, pictures, strict=True):
        left = _GAP
        for (title, _, _), pixels in zip(row, drawn, strict=True):
            sheet.paste(images.fromarray(pixels), (left, top + _LINE))
            text = _cut(title, pixels.shape[1], font)
            draw.text((left, top + _LINE / 2), text, fill=_INK, font=font, anchor="lm")
            left += pixels.shape[1] + _GAP
        top += height + _GAP
    _draw_legend(draw, marks, top, font)
    return _write(Path(path), sheet)


def _write(path: Path, sheet: Image) -> Path:
    """Puts the picture at `path`, whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            sheet.save(file, "PNG", optimize=True)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _pixels(title: str, grey: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """A panel (rows, columns, 3) uint8."""
    if grey.ndim != 2 or 0 in grey.shape or (mask is not None and mask.shape != grey.shape):
        raise ValueError(
            f"panel {title!r}: grey values have shape {grey.shape} and the mask "
            f"{None if mask is None else mask.shape}; give both as (H, W)"
        )
    times = -(-_SMALLEST // max(grey.shape))
    large = _enlarged(np.nan_to_num(np.clip(grey, 0, 1)) * 255, times)
    plain = np.repeat(large[:, :, None], 3, axis=2)
    if mask is None:
        return plain.astype(np.uint8)
    label = _enlarged(mask, times)
    pixels = tinted(plain, label).astype(np.uint8)
    border = _border(label)
    pixels[border] = colours_of(label)[border]
    return pixels


def _enlarged(plane: np.ndarray, times: int) -> np.ndarray:
    large: np.ndarray = plane.repeat(times, axis=0).repeat(times, axis=1)
    return large


def _border(label: np.ndarray) -> np.ndarray:
    """Foreground pixels (H, W) bool with another class above, below or beside them."""
    around = np.pad(label, 1, mode="edge")
    other = np.zeros(label.shape, bool)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        shifted = around[rows : rows + label.shape[0], columns : columns + label.shape[1]]
        other |= shifted != label
    border: np.ndarray = other & (label > 0)
    return border


def _legend(
    class_names: Sequence[str], wide: int, font: FreeTypeFont | ImageFont
) -> list[tuple[int, int, str, tuple[int, int, int]]]:
    """Line, pixels from the left, name and colour of each class; lines break where they must."""
    marks, line, left = [], 0, _GAP
    for number, name in enumerate(class_names):
        text = _cut(name, wide - 4 * _GAP, font)
        length = _TEXT + _GAP + round(font.getlength(text))
        if left > _GAP and left + length > wide - _GAP:
            line, left = line + 1, _GAP
        marks.append((line, left, text, COLOURS[number % len(COLOURS)]))
        left += length + 2 * _GAP
    return marks


def _draw_legend(
    draw: ImageDraw,
    marks: Sequence[tuple[int, int, str, tuple[int, int, int]]],
    top: int,
    font: FreeTypeFont | ImageFont,
) -> None:
    for line, left, text, colour in marks:
        middle = top + line * _LINE + _LINE // 2
        box = (left, middle - _TEXT // 2, left + _TEXT, middle + _TEXT // 2)
        draw.rectangle(box, fill=colour)
        draw.text((left + _TEXT + _GAP, middle), text, fill=_INK, font=font, anchor="lm")


def _cut(text: str, length: int, font: FreeTypeFont | ImageFont) -> str:
    """The text on one line, shortened to `length` pixels if need be."""
    text = " ".join(text.split())
    if font.getlength(text) <= length:
        return text
    while text and font.getlength(text + "…") > length:
        text = text[:-1]
    return text + "…"
