"""Small scans in the layout of KiTS19: real NIfTI files that train in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

CASES = 4  # of a site: three to train on, the last to test


def write_sites(root: Path, sites: Sequence[str], slices: Sequence[int] = (4, 5)) -> None:
    """Writes scans and table; a case of the k-th site has `slices[k]` slices."""
    root.mkdir(parents=True, exist_ok=True)
    lines = ["case_ids,site_ids,train_test_split,train_test_split_silo"]
    for number in range(CASES * len(sites)):
        index, position = divmod(number, CASES)
        split = "test" if position == CASES - 1 else "train"
        lines.append(f"case_{number:05d},{sites[index]},{split},{split}_{sites[index]}")
        write_case(root, number, slices[index])
    (root / "thresholded_sites.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_case(root: Path, number: int, slices: int) -> None:
    """A bright kidney with a brighter tumour in it; the last slice is empty."""
    draw = np.random.default_rng(number)
    label = np.zeros((slices, 40, 36), np.uint8)
    label[: slices - 1, 8:30, 6:28] = 1
    label[1 : slices - 1, 14:22, 10:18] = 2
    image = np.array([-80.0, 60.0, 140.0])[label] + draw.normal(0, 12, label.shape)
    # KiTS19: slices first, the first axis runs along the body.
    affine = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
    folder = root / f"case_{number:05d}"
    folder.mkdir(parents=True)
    for name, array in (("imaging", image.astype(np.int16)), ("segmentation", label)):
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
