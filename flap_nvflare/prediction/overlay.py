"""Three slices of a scan under their mask, for a first look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flap_nvflare.data.panels import draw_panels
from flap_nvflare.data.planes import LARGEST, slices_to_show, square
from flap_nvflare.data.scan import Scan
from flap_nvflare.data.window import Window


def draw_overlay(
    path: Path, scan: Scan, mask: np.ndarray, window: Window, class_names: Sequence[str]
) -> Path:
    """Writes the slices side by side as PNG; up is the patient's front, left the patient's right.

    Args:
        path: the PNG to write.
        scan: the scan.
        mask: (S, H, W) uint8.
        window: black and white are its ends.
        class_names: of the foreground classes.
    """
    panels = []
    for number in slices_to_show(mask):
        grey = window.shown(scan.slab(number, number + 1)[0])
        title = f"slice {number + 1} of {len(mask)}"
        steps = scan.spacing[1:]
        panels.append((title, square(grey, steps, LARGEST), square(mask[number], steps, LARGEST)))
    return draw_panels(path, panels, class_names)
