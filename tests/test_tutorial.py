"""The README's tutorial: its commands lead from scans to a mask, a page and a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from page import ROOT, commands, environment, run_lines

README = (ROOT / "README.md").read_text(encoding="utf-8")
TUTORIAL = README[README.index("## Tutorial") : README.index("## After a run")]
CASE = "case_00004"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tutorial_as_it_stands(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "jobs").symlink_to(ROOT / "jobs")
    lines = commands(TUTORIAL)
    assert lines[0] == "pip install ."
    # The environment that runs this test stands for the one that the first command makes.
    said = run_lines(["true", *lines[1:]], place, environment(tmp_path), 550)

    text = dict(zip(lines, said, strict=True))
    (shown,) = (out for line, out in text.items() if line.startswith("head "))
    assert all(line in TUTORIAL for line in shown.splitlines())
    (checked,) = (out for line, out in text.items() if line.startswith("flap-nvflare doctor"))
    assert " 0 fail" in checked
    (run,) = (tmp_path / "home" / ".flap_nvflare" / "runs" / "fed_kits").iterdir()
    judged = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert judged["synthetic"]
    assert judged["models"]["federated"]["sites"].keys() == {"A", "B"}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "The scans of this run are SYNTHETIC" in page
    assert page.count("data:image/png") == 2

    masks = [
        nib.load(place / path)
        for path in (
            "masks/imaging_mask.nii.gz",
            f"kidney_bundle/eval/{CASE}/imaging_seg.nii.gz",
        )
    ]
    scan = nib.load(place / "scans" / CASE / "imaging.nii.gz")
    truth = np.asarray(nib.load(place / "scans" / CASE / "segmentation.nii.gz").dataobj) > 0
    found = [np.asarray(mask.dataobj) for mask in masks]
    for mask in masks:
        np.testing.assert_array_equal(mask.affine, scan.affine)
    # The bundle's weights are merged: a voxel on a border may fall to the other side.
    assert (found[0] != found[1]).mean() < 1e-4
    assert 2 * ((found[0] > 0) & truth).sum() / ((found[0] > 0).sum() + truth.sum()) > 0.6
    assert (place / "masks" / "imaging_overlay.png").is_file()
