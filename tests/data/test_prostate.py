"""SAML's six folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layout_files import refused, splits, write_prostate, write_scan

from flap_nvflare.data.layouts import layout_of, list_cases, site_names
from flap_nvflare.data.prostate import TEST_CASES
from flap_nvflare.data.source import read_cases
from flap_nvflare.data.volume import load_volume


def test_the_published_split_and_one_class(tmp_path: Path) -> None:
    root = write_prostate(tmp_path, {"RUNMC": [3, 4, 5], "BIDMC": [0, 1]})
    assert layout_of(root).name == "prostate"
    assert site_names(root) == ["BIDMC", "RUNMC"]
    assert splits(root, "BIDMC") == {"BIDMC-Case00": "test", "BIDMC-Case01": "train"}
    cases = read_cases(root, "RUNMC", 0.0, 0)
    assert [case.name for case in cases.train] == ["RUNMC-Case04", "RUNMC-Case05"]
    for case in (*cases.train, *cases.test):
        assert np.unique(load_volume(case, 1).label).tolist() == [0, 1]


def test_the_published_test_cases_are_counted() -> None:
    counts = {site: len(cases) for site, cases in TEST_CASES.items()}
    assert counts == {"RUNMC": 6, "BMC": 6, "I2CVB": 4, "UCL": 3, "BIDMC": 3, "HK": 3}


@pytest.mark.parametrize("inner", ["", "Processed_data_nii"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_ways_in_which_it_comes(tmp_path: Path, inner: str, ending: str) -> None:
    write_prostate(tmp_path / inner, {"HK": [38, 40]}, ending)
    mask = tmp_path / inner / "HK" / f"Case38_segmentation{ending}"
    mask.rename(mask.with_name(f"Case38_Segmentation{ending}"))
    assert splits(tmp_path, "HK") == {"HK-Case38": "test", "HK-Case40": "train"}
    assert load_volume(list_cases(tmp_path, "HK")[0], 1).label.any()


def test_a_missing_mask_two_masks_and_a_missing_scan(tmp_path: Path) -> None:
    root = write_prostate(tmp_path, {"HK": [38, 40]})
    mask = root / "HK" / "Case40_segmentation.nii.gz"
    write_scan(root / "HK" / "Case40_Segmentation.nii.gz")
    assert "HK-Case40 has 2 files as its mask: HK/Case40_Segmentation.nii.gz, HK/" in refused(
        root, "HK"
    )
    (root / "HK" / "Case40_Segmentation.nii.gz").unlink()
    mask.unlink()
    assert "HK-Case40 has no mask; expected HK/Case40_segmentation.nii.gz" in refused(root, "HK")
    (root / "HK" / "Case38.nii.gz").unlink()
    assert "HK-Case38 has no scan; expected HK/Case38.nii.gz" in refused(root, "HK")
