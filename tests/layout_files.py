"""Tiny scans in the layouts of IXI, SAML's prostate set, nnU-Net and the Decathlon."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.layouts import list_cases, site_names

SHAPE = (12, 10, 4)  # width, height, slices, as most sets other than KiTS19 store them
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
IXI = ("IXI012-HH-1211", "IXI013-HH-1212", "IXI002-Guys-0828", "IXI016-Guys-0697")


def write_scan(
    path: Path, label: int = 1, seed: int = 0, affine: np.ndarray = AFFINE
) -> np.ndarray:
    """A scan that is brighter where its mask, which is returned, holds `label`."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:8, 3:7, 1:3] = label
    noise = np.random.default_rng(seed).normal(0, 5, SHAPE)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image((100 * (mask > 0) + noise).astype(np.int16), AFFINE), path)
    return mask


def write_pair(
    scan: Path, mask: Path, label: int = 1, seed: int = 0, mask_affine: np.ndarray = AFFINE
) -> None:
    """A scan and its mask."""
    values = write_scan(scan, label, seed)
    mask.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, mask_affine), mask)


def write_table(root: Path, *lines: str) -> None:
    """`sites.csv` with these lines."""
    (root / "sites.csv").write_text("\n".join(["case,site,split", *lines]) + "\n")


def write_flamby_ixi(root: Path, names: Iterable[str] = IXI) -> Path:
    """IXI Tiny as FLamby unzips it, without its table."""
    for seed, name in enumerate(names):
        folder = root / "7kd5wj7v7p-3" / "IXI_sample" / name
        write_pair(
            folder / "T1" / f"{name}-T1.nii.gz", folder / "label" / f"{name}.nii.gz", 1, seed
        )
    return root


def write_torchio_ixi(root: Path, names: Iterable[str] = IXI) -> Path:
    """IXITiny as TorchIO unzips it."""
    for seed, name in enumerate(names):
        scan, mask = (
            root / "image" / f"{name}_image.nii.gz",
            root / "label" / f"{name}_label.nii.gz",
        )
        write_pair(scan, mask, 1, seed)
    return root


def write_own_ixi(root: Path, names: Iterable[str] = IXI) -> Path:
    """IXI's own tar, with masks beside it."""
    for seed, name in enumerate(names):
        scan, mask = root / "IXI-T1" / f"{name}-T1.nii.gz", root / "label" / f"{name}.nii.gz"
        write_pair(scan, mask, 1, seed)
    return root


def write_prostate(root: Path, cases: dict[str, Sequence[int]], ending: str = ".nii.gz") -> Path:
    """SAML's folders with these cases of each; every other mask holds the label 2."""
    for hospital, numbers in cases.items():
        for number in numbers:
            place = root / hospital / f"Case{number:02d}"
            scan = place.with_name(f"{place.name}{ending}")
            mask = place.with_name(f"{place.name}_segmentation{ending}")
            write_pair(scan, mask, 1 + number % 2, number)
    return root


def write_nnunet(
    root: Path,
    train: Sequence[str],
    test: Sequence[str] = (),
    channel: str = "_0000",
    **described: Any,
) -> Path:
    """nnU-Net's folders; with `channel` empty the Decathlon's names."""
    for which, names in (("Tr", train), ("Ts", test)):
        for seed, name in enumerate(names):
            scan = root / f"images{which}" / f"{name}{channel}.nii.gz"
            write_pair(scan, root / f"labels{which}" / f"{name}.nii.gz", 1, seed)
    values = {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}, **described}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(values))
    return root


def splits(root: Path, site: str) -> dict[str, str]:
    """The split of each case of a site."""
    return {case.name: case.split for case in list_cases(root, site)}


def refused(root: Path, site: str = "") -> str:
    """What is said to whoever asks for the cases of the site, or for the sites."""
    with pytest.raises(DataError) as caught:
        list_cases(root, site) if site else site_names(root)
    return str(caught.value)
