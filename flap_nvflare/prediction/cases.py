"""Scans one after the other: a mask each, on from where an earlier call stopped.

A scan that cannot be used does not keep the others from theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_nvflare.data.errors import DataError
from flap_nvflare.prediction.inputs import MASK, Input
from flap_nvflare.prediction.masks import is_done, read_mask, stamp_of, write_mask
from flap_nvflare.prediction.predictor import Predictor

OVERLAY = "_overlay.png"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Done:
    """What became of one scan.

    Attributes:
        file: the scan.
        status: `written`, `kept` (it was there already) or `failed`.
        mask: the mask's file; None if it failed.
        shape: (S, H, W), slices first.
        seconds: from opening the scan to the file on the disk.
        classes: voxels and millilitres by class.
        error: why it failed.
    """

    file: Path
    status: str
    mask: Path | None = None
    shape: tuple[int, ...] = ()
    seconds: float = 0.0
    classes: dict[str, dict[str, float]] | None = None
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds; only those that say something."""
        values = {
            "file": str(self.file),
            "status": self.status,
            "mask": str(self.mask or ""),
            "shape": list(self.shape),
            "seconds": round(self.seconds, 3),
            "classes": self.classes,
            "error": self.error,
        }
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True)
class Cases:
    """Predicts scans into a folder.

    Args:
        predictor: the network with its grey values.
        made_by: SHA-256 of the adapter's file and of the base.
        out: folder for the masks.
        overlays: whether a picture is drawn beside each mask.
        overwrite: whether masks that are there are made anew.
    """

    predictor: Predictor
    made_by: tuple[str, str]
    out: Path
    overlays: bool = False
    overwrite: bool = False

    def run(
        self, inputs: Sequence[Input], progress: Progress = lambda name, done, slices: None
    ) -> Iterator[Done]:
        """What became of each scan, as it is done.

        Args:
            inputs: the scans.
            progress: told name, slices done and slices in all after every batch.
        """
        for one in inputs:
            try:
                yield self._one(one, progress)
            except Exception as error:  # whatever a damaged file makes a library raise
                yield Done(one.path, "failed", error=_line(one, error))

    def _one(self, one: Input, progress: Progress) -> Done:
        started = time.perf_counter()
        path = self.out / f"{one.name}{MASK}"
        stamp = stamp_of(*self.made_by, self.predictor.window, one.sha256())
        kept = not self.overwrite and is_done(path, stamp)
        scan = one.open()
        if kept:
            mask = read_mask(path)
        else:
            slices = scan.shape[0]
            mask = self.predictor.mask(scan, lambda done: progress(one.name, done, slices))
            write_mask(path, mask, scan, stamp)
        names = self.predictor.federation.class_names
        picture = self.out / f"{one.name}{OVERLAY}"
        if self.overlays and not (kept and picture.exists()):
            from flap_nvflare.prediction.overlay import draw_overlay

            draw_overlay(picture, scan, mask, self.predictor.window_of(scan), names)
        return Done(
            file=one.path,
            status="kept" if kept else "written",
            mask=path,
            shape=scan.shape,
            seconds=time.perf_counter() - started,
            classes=sizes(mask, names, scan.voxel_ml),
        )


def sizes(mask: np.ndarray, names: Sequence[str], voxel_ml: float) -> dict[str, dict[str, float]]:
    """Voxels and millilitres of each class.

    Args:
        mask: (S, H, W) class indices.
        names: of the foreground classes, from class 1.
        voxel_ml: millilitres of a voxel.
    """
    # Slice by slice: a count makes 8 bytes of each voxel.
    counts = sum(np.bincount(plane.ravel(), minlength=len(names) + 1) for plane in mask)
    return {
        name: {"voxels": int(count), "ml": round(int(count) * voxel_ml, 3)}
        for name, count in zip(names, np.asarray(counts)[1:], strict=True)
    }


def require_writable(folder: Path) -> None:
    """Makes the folder and a file in it, before hours of work are lost to a missing right.

    Raises:
        DataError: if that cannot be done.
    """
    from tempfile import TemporaryFile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written to ({error.strerror}); give another --out"
        ) from error


def _line(one: Input, error: Exception) -> str:
    """The error on one line, with the scan's name if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, DataError) else f"{one.path}: {text}"
