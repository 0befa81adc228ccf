"""Three slices of a scan with their masks as a PNG, for the eyes of whoever knows the patients.

No check sees that a mask lies on the wrong organ or that left and right are swapped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flap_nvflare.data.panels import draw_rows, panels_of
from flap_nvflare.data.volume import Volume


def write_picture(path: Path, volume: Volume, class_names: Sequence[str]) -> None:
    """Writes a PNG that only its owner may read: the slices as they are, below with their masks.

    Up is the patient's front, left the patient's right.
    """
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700, parents=True)
        _give(path.parent)
    masked = panels_of(volume, volume.name)
    draw_rows(path, [[(title, grey, None) for title, grey, _ in masked], masked], class_names)
    _give(path)


def _give(path: Path) -> None:
    """What root makes in another's kit is that other's, as whom FLARE runs."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
