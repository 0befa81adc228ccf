"""Two sites with scans of a few small slices, and settings for seconds of training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from flap_nvflare.settings import Federation, Site

# A numpy or scipy built for many cores must not start them in every subprocess.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SETTINGS: dict[str, Any] = {
    "base": "random",
    "image_size": 32,
    "rank": 2,
    "rounds": 2,
    "batch_size": 4,
    "validation_fraction": 0.34,
    "threads": 1,
    "seed": 3,
}


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


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites A and B, each with three training cases and one test case."""
    root = tmp_path_factory.mktemp("kits")
    lines = ["case_ids,site_ids,train_test_split,train_test_split_silo"]
    for site in (0, 1):
        for position in range(4):
            split = "test" if position == 3 else "train"
            number = 10 * site + position
            write_case(root, number, slices=4 + site)
            lines.append(f"case_{number:05d},{site},{split},{split}_{site}")
    (root / "thresholded_sites.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def federation() -> Federation:
    return Federation.from_dict(SETTINGS)


@pytest.fixture
def site(scans: Path) -> Site:
    return Site("A", scans, device="cpu")
