"""Which slices are shown, in which grey, and the right way round."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from flap_nvflare.data.planes import slices_to_show
from flap_nvflare.data.scan import open_scan
from flap_nvflare.data.window import Window
from flap_nvflare.prediction.overlay import draw_overlay


def test_the_fullest_slice_of_each_third() -> None:
    mask = np.zeros((20, 4, 4), np.uint8)
    mask[3:12, 0, 0] = 1
    mask[4, 0] = mask[6, 0] = mask[11, 1] = 2
    assert slices_to_show(mask) == [4, 6, 11]


def test_few_and_no_slices_with_foreground() -> None:
    mask = np.zeros((9, 4, 4), np.uint8)
    assert slices_to_show(mask) == [4]
    mask[7] = 1
    assert slices_to_show(mask) == [7]


def test_grey_runs_over_the_window_and_pixels_are_square(tmp_path: Path) -> None:
    voxels = np.zeros((2, 200, 400), np.int16)  # slices, 200 rows of 2 mm, 400 columns of 1 mm
    voxels[:, 100:] = 100
    affine = np.array([[0, 0, -1, 0], [0, -2, 0, 0], [-3, 0, 0, 0], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "a.nii")
    scan = open_scan(tmp_path / "a.nii")
    path = draw_overlay(
        tmp_path / "a.png", scan, np.zeros(scan.shape, np.uint8), Window(-100, 100, 0, 1), ["a"]
    )
    pixels = np.asarray(Image.open(path))[24 : 24 + 400, 8:408, 0]
    assert (pixels[:190] == 127).all()
    assert (pixels[210:] == 255).all()
