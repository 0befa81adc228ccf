"""Inference of the bundle: slices of scans without masks in, masks as NIfTI out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys
from torch.utils.data import IterableDataset

from flap_nvflare.data.cases import ENDINGS, stem
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.prepared import prepare_images
from flap_nvflare.data.scan import Scan, check_values, mask_image, open_scan
from flap_nvflare.data.slices import image_batches
from flap_nvflare.data.window import Window, scan_window
from flap_nvflare.training.volume_scorer import native_masks

logger = logging.getLogger(__name__)

SCAN, NAME = "scan", "name"  # keys of a batch


class ScanBatches(IterableDataset[dict[str, Any]]):
    """Every slice of every scan once, in order, in batches that never cross scans.

    A batch holds `image` (n, 3, S', S') float32, `scan` and `name`, the scan's path in the folder
    without its ending. One scan is in memory at a time, as its file stores it.

    Args:
        folder: of the scans.
        pattern: which of its files are scans, such as `*/imaging.nii.gz`.
        window: the grey values; None for those of each scan by itself.
        image_size: S', side of the network's input.
        channels: as in training, see `data.slices.SliceDataset`.
        batch_size: n, at most.

    Raises:
        DataError: if no file fits, one is no NIfTI by its name, or two differ by their ending
            alone.
    """

    def __init__(
        self,
        folder: Path | str | None,
        pattern: str,
        window: Window | None,
        image_size: int,
        channels: str,
        batch_size: int,
    ) -> None:
        if folder is None:
            raise DataError("no scans are named; give --dataset_dir FOLDER")
        self.folder = Path(folder)
        self.paths = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        if not self.paths:
            raise DataError(
                f"{folder}: no file fits {pattern!r}; give another --dataset_dir or --pattern"
            )
        for path in self.paths:
            if not path.name.endswith(ENDINGS):
                raise DataError(f"{path}: is no NIfTI file; give a --pattern that leaves it out")
        for path, other in pairwise(sorted(self.paths, key=self._name)):
            if self._name(path) == self._name(other):
                raise DataError(
                    f"{path} and {other}: their masks would have one name; give a --pattern that "
                    "leaves one out"
                )
        self._window, self._size = window, image_size
        self._channels, self._batch = channels, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self.paths:
            scan, name = open_scan(path), self._name(path)
            check_values(path, scan.slabs())
            for image, _ in image_batches(
                self._images(scan), scan.shape[0], self._channels, self._batch
            ):
                yield {CommonKeys.IMAGE: image, SCAN: scan, NAME: name}

    def _images(self, scan: Scan) -> Callable[[int, int], torch.Tensor]:
        window = self._window or scan_window(scan)
        return lambda first, last: prepare_images(scan.slab(first, last), window, self._size)

    def _name(self, path: Path) -> str:
        return stem(path.relative_to(self.folder).as_posix())


class MaskWriter:
    """Handler of MONAI's evaluator over `ScanBatches`: writes `<name>_seg.nii.gz` of every scan.

    A mask has the grid, the order of axes and the affine of its scan's file.

    Args:
        output_dir: folder for the masks.
    """

    def __init__(self, output_dir: Path | str) -> None:
        self.folder = Path(output_dir)
        self._slices: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Registers the handler with an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Takes in the logits (n, C+1, S', S') of the next n slices of the present scan."""
        scan: Scan = engine.state.batch[SCAN]
        count, *size = scan.shape
        self._slices.extend(native_masks(engine.state.output[CommonKeys.PRED], tuple(size)))
        if len(self._slices) < count:
            return
        path = self.folder / f"{engine.state.batch[NAME]}_seg.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(mask_image(torch.stack(self._slices).numpy(), scan), path)
        self._slices = []
        logger.info("%s: mask of %d slices in %s", scan.path, count, path)
