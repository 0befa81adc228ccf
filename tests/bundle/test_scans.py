"""Scans without masks, as the bundle's inference reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flap_nvflare.bundle.scans import ScanBatches
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.kits import Case
from flap_nvflare.data.prepared import prepare_images
from flap_nvflare.data.volume import load_volume
from flap_nvflare.data.window import KITS_WINDOWS, Window, volume_window

WINDOW = KITS_WINDOWS["A"]


def batches(
    folder: Path | None, pattern: str, channels: str = "repeat", window: Window | None = WINDOW
) -> ScanBatches:
    return ScanBatches(folder, pattern, window, 32, channels, batch_size=3)


@pytest.mark.parametrize("window", [WINDOW, None], ids=["site", "scan"])
@pytest.mark.parametrize(
    ("channels", "offsets"), [("repeat", (0, 0, 0)), ("neighbours", (-1, 0, 1))]
)
def test_every_slice_comes_once_as_in_training(
    scans: Path, channels: str, offsets: tuple[int, ...], window: Window | None
) -> None:
    found = list(batches(scans, "case_0000[45]/imaging.nii.gz", channels, window))
    assert [len(batch["image"]) for batch in found] == [3, 2, 3, 2]  # five slices a scan
    assert [batch["name"] for batch in found[1:3]] == ["case_00004/imaging", "case_00005/imaging"]
    folder = scans / "case_00005"
    case = Case("5", folder / "imaging.nii.gz", folder / "segmentation.nii.gz")
    volume = load_volume(case, 2)
    expected = prepare_images(volume.image, window or volume_window(volume), 32)
    images = torch.cat([batch["image"] for batch in found[2:]])
    for channel, offset in enumerate(offsets):
        places = np.clip(np.arange(5) + offset, 0, 4)
        assert torch.equal(images[:, channel], expected[places])


def test_what_names_no_scan_is_refused(scans: Path) -> None:
    with pytest.raises(DataError, match="give --dataset_dir"):
        batches(None, "*.nii.gz")
    with pytest.raises(DataError, match=r"no file fits '\*.nii'"):
        batches(scans, "*.nii")
    with pytest.raises(DataError, match=r"thresholded_sites.csv: is no NIfTI file"):
        batches(scans, "*.csv")


def test_no_mask_replaces_that_of_another_scan(tmp_path: Path) -> None:
    for ending in ("nii", "nii.gz"):
        (tmp_path / f"one.{ending}").touch()
    (tmp_path / "one.more.nii").touch()
    with pytest.raises(DataError, match=r"one\.nii and .*one\.nii\.gz: their masks"):
        batches(tmp_path, "*")
    assert len(batches(tmp_path, "*.nii").paths) == 2
