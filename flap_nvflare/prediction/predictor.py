"""The mask of a scan, batch by batch of its slices: each is prepared and run once.

Orientation, window, resizing, channels and the way back to native resolution are those of training
and evaluation, by the same functions, so a mask is voxel for voxel the one that an evaluation of
the case scores. In memory are the scan as its file stores it, one batch, and the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_nvflare.bundle.builders import make_runtime
from flap_nvflare.bundle.trained import Trained
from flap_nvflare.data.prepared import prepare_images
from flap_nvflare.data.scan import Scan, check_values
from flap_nvflare.data.slices import image_batches
from flap_nvflare.data.store import Store
from flap_nvflare.data.window import Window, scan_window
from flap_nvflare.sam.runtime import place
from flap_nvflare.settings import Site
from flap_nvflare.training.inferer import AutocastInferer, choose_device
from flap_nvflare.training.prefix_cache import PrefixCache
from flap_nvflare.training.volume_scorer import native_masks


class Predictor:
    """A trained network on its device.

    Args:
        trained: the network, which is put on the device in place.
        window: grey values of the scans; None where the adapter was trained with those of each
            scan by itself.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        batch: slices run at once; 0 for as many as in training, the evaluation's number.

    Attributes:
        federation: the settings of the adapter.
        window: as given.
        runtime: how the network runs.
    """

    def __init__(
        self, trained: Trained, window: Window | None, device: str = "auto", batch: int = 0
    ) -> None:
        if batch < 0:
            raise ValueError(f"batch is {batch}; give at least 1 slice")
        if (window is None) != (trained.federation.grey_values == "scan"):
            raise ValueError(
                f"window is {window}, but grey_values is {trained.federation.grey_values!r}; see "
                "bundle.grey.choose_window"
            )
        self.federation = trained.federation
        self.window = window
        self.batch = batch or trained.federation.batch_size
        site = Site("prediction", Path(), device=device)
        self.runtime = make_runtime(
            trained.network, trained.federation, site, choose_device(device)
        )
        self._network = place(trained.network, self.runtime)
        self._infer = AutocastInferer(self.runtime)
        # Where nothing of the encoder trains, an evaluation rounds its tokens in between; so here.
        self._prefix = PrefixCache(self._network, self.runtime, Store(None, 0), memory_bytes=0)

    def mask(self, scan: Scan, progress: Callable[[int], None] = lambda slices: None) -> np.ndarray:
        """Class indices (S, H, W) uint8 of a scan.

        Args:
            scan: the scan.
            progress: told the number of slices done after every batch.

        Raises:
            DataError: if the scan holds NaN, infinity or nothing but one value.
        """
        _, height, width = scan.shape
        check_values(scan.path, scan.slabs())
        mask = np.empty(scan.shape, np.uint8)
        done = 0
        with torch.inference_mode():
            for batch in self._prefix.batches(self._batches(scan)):
                logits = self._infer(batch["image"].to(self.runtime.device), self._network)
                part = native_masks(logits, (height, width)).numpy()
                mask[done : done + len(part)] = part
                done += len(part)
                progress(done)
        return mask

    def window_of(self, scan: Scan) -> Window:
        """What the network sees the scan through.

        Raises:
            DataError: as `scan_window`.
        """
        return self.window or scan_window(scan)

    def _batches(self, scan: Scan) -> Iterator[dict[str, Any]]:
        size, window = self.federation.image_size, self.window_of(scan)
        for images, places in image_batches(
            lambda first, last: prepare_images(scan.slab(first, last), window, size),
            scan.shape[0],
            self.federation.channels,
            self.batch,
        ):
            yield {"image": images, "key": [str(place) for place in places]}
