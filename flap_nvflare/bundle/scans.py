"""Inference of the bundle: slices of scans without masks in, masks as NIfTI out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys
from torch.utils.data import IterableDataset

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.kits import Case
from flap_nvflare.data.prepared import network_slices
from flap_nvflare.data.slices import channel_slices
from flap_nvflare.data.volume import load_image, write_mask
from flap_nvflare.data.window import Window
from flap_nvflare.training.volume_scorer import native_masks

logger = logging.getLogger(__name__)

SCAN = "scan"  # key of a batch
_ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Scan:
    """A scan whose slices are predicted.

    Attributes:
        path: its file.
        name: its path below the data set's folder, without the ending.
        shape: (S, H, W) in the order of `data.volume`.
    """

    path: Path
    name: str
    shape: tuple[int, int, int]


class ScanBatches(IterableDataset[dict[str, Any]]):
    """Every slice of every scan once, in order, in batches that never cross scans.

    A batch holds `image` (n, 3, S', S') float32 and `scan`. One scan is in memory at a time.

    Args:
        folder: of the scans.
        pattern: which of its files are scans, such as `*/imaging.nii.gz`.
        window: the grey values.
        image_size: S', side of the network's input.
        channels: as in training, see `data.slices.SliceDataset`.
        batch_size: n, at most.

    Raises:
        DataError: if no file fits, or one is no NIfTI by its name.
    """

    def __init__(
        self,
        folder: Path | str,
        pattern: str,
        window: Window,
        image_size: int,
        channels: str,
        batch_size: int,
    ) -> None:
        self.folder = Path(folder)
        self.paths = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        if not self.paths:
            raise DataError(
                f"{folder}: no file fits {pattern!r}; give --dataset_dir FOLDER and --pattern"
            )
        for path in self.paths:
            if not path.name.endswith(_ENDINGS):
                raise DataError(f"{path}: is no NIfTI file; give a --pattern that leaves it out")
        self._window, self._size = window, image_size
        self._channels, self._batch = channels, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self.paths:
            hu = load_image(path)
            slices, height, width = hu.shape
            scan = Scan(path, self._name(path), (slices, height, width))
            for start in range(0, slices, self._batch):
                places = range(start, min(start + self._batch, slices))
                chosen = [channel_slices(place, slices, self._channels) for place in places]
                first, last = chosen[0][0], chosen[-1][2]
                seen = network_slices(hu[first : last + 1], self._window, self._size)
                image = torch.stack([seen[[k - first for k in three]] for three in chosen])
                yield {CommonKeys.IMAGE: image, SCAN: scan}

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.folder).as_posix()
        return next(name.removesuffix(end) for end in _ENDINGS if name.endswith(end))


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
        slices, *size = scan.shape
        self._slices.extend(native_masks(engine.state.output[CommonKeys.PRED], tuple(size)))
        if len(self._slices) < slices:
            return
        path = self.folder / f"{scan.name}_seg.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = torch.stack(self._slices).numpy()
        self._slices = []
        write_mask(path, mask, Case(scan.name, scan.path, scan.path))
        logger.info("%s: mask of %d slices in %s", scan.path, slices, path)
