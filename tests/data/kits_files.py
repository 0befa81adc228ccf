"""Small KiTS folders that a test can read at a glance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from flap_nvflare.data.kits import Case
from flap_nvflare.data.prepared import Prepared, PrepareSlices
from flap_nvflare.data.volume import Volume
from flap_nvflare.data.window import Window

HEADER = "case_ids,site_ids,train_test_split,train_test_split_silo"
# Slices x height x width with the slices along the body, as in KiTS19.
KITS_AFFINE = np.array([[0, 0, -2.0, 0], [0, -2.0, 0, 0], [-5.0, 0, 0, 0], [0, 0, 0, 1.0]])


def write_table(root: Path, lines: Iterable[str], header: str = HEADER) -> None:
    """A table with these lines and an empty file for each scan and mask."""
    root.mkdir(parents=True, exist_ok=True)
    lines = list(lines)
    (root / "thresholded_sites.csv").write_text("\n".join([header, *lines]) + "\n")
    for line in lines:
        name = line.split(",")[0]
        if name.startswith("case"):
            (root / name).mkdir(exist_ok=True)
            (root / name / "imaging.nii.gz").touch()
            (root / name / "segmentation.nii.gz").touch()


def site_lines(site: object, train: int, test: int, first: int = 0) -> list[str]:
    """Lines of one site with as many cases of each split, as FLamby writes them."""
    splits = ["train"] * train + ["test"] * test
    return [
        f"case_{first + number:05d},{site},{split},{split}_{site}"
        for number, split in enumerate(splits)
    ]


def write_case(
    folder: Path,
    image: np.ndarray,
    label: np.ndarray,
    affine: np.ndarray = KITS_AFFINE,
    label_affine: np.ndarray | None = None,
) -> Case:
    """Real NIfTI files of a scan and its mask."""
    folder.mkdir(parents=True, exist_ok=True)
    case = Case(folder.name, folder / "imaging.nii.gz", folder / "segmentation.nii.gz")
    nib.save(nib.Nifti1Image(image, affine), case.image)
    own = affine if label_affine is None else label_affine
    nib.save(nib.Nifti1Image(label, own), case.label)
    return case


def make_volume(image: np.ndarray, label: np.ndarray, name: str = "case_00000") -> Volume:
    """A volume in memory, 1 mm voxels."""
    return Volume(name, image.astype(np.float32), label.astype(np.uint8), (1.0, 1.0, 1.0))


def flat_volume(values: Sequence[float], shown: Iterable[int], side: int = 4) -> Volume:
    """Slices of one value each; those in `shown` are foreground as a whole."""
    image = np.broadcast_to(np.array(values)[:, None, None], (len(values), side, side))
    label = np.zeros(image.shape)
    label[list(shown)] = 1
    return make_volume(image, label)


def prepare_volume(volume: Volume, window: Window, side: int, key: str = "a key") -> Prepared:
    """A volume in memory as the network sees it, (S, side, side)."""
    data = {"volume": volume, "window": window, "image_size": side}
    return Prepared.of(volume.name, key, PrepareSlices()(data))
