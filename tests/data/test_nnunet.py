"""nnU-Net's folders of both versions, and the Decathlon's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from layout_files import (
    AFFINE,
    SHAPE,
    refused,
    splits,
    write_nnunet,
    write_pair,
    write_scan,
    write_table,
)

from flap_nvflare.data.entries import assigned
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.layouts import layout_of, list_cases, site_names
from flap_nvflare.data.nnunet import nnunet_class_names, nnunet_entries, nnunet_grey_values
from flap_nvflare.data.volume import load_volume


def given(root: Path) -> dict[str, str]:
    """The split of every case if all are of one site."""
    return {entry.name: entry.split for entry in assigned(nnunet_entries(root), "here")}


def test_a_table_of_sites_is_needed(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, ["a", "b", "c"])
    assert layout_of(root).name == "nnunet"
    assert f"flap-nvflare prepare nnunet {root} --site NAME" in refused(root)
    write_table(root, "a,munich,train", "b,munich,test", "c,basel,train")
    assert site_names(root) == ["basel", "munich"]
    assert splits(root, "munich") == {"a": "train", "b": "test"}
    assert "'basel' has no test case" in refused(root, "basel")


@pytest.mark.parametrize("channel", ["", "_0000"])
def test_labelled_test_cases_are_the_test_cases(tmp_path: Path, channel: str) -> None:
    root = write_nnunet(tmp_path, ["la_003", "la_004"], ["la_001"], channel)
    write_scan(root / "imagesTs" / f"la_002{channel}.nii.gz")  # without a mask: nobody's
    assert given(root) == {"la_001": "test", "la_003": "train", "la_004": "train"}
    write_table(root, "la_003,A,train", "la_001,A,test")
    for case in list_cases(root, "A"):
        assert load_volume(case, 1).label.any()


def test_without_them_a_fifth_is(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, [f"case_{number}" for number in range(6)])
    assert list(given(root).values()).count("test") == 1


@pytest.mark.parametrize("channel", ["", "_0000"])
def test_a_name_that_ends_in_four_digits(tmp_path: Path, channel: str) -> None:
    root = write_nnunet(tmp_path, ["liver_0001", "liver_0000"], channel=channel)
    assert sorted(given(root)) == ["liver_0000", "liver_0001"]
    write_table(root, "liver_0000,A,train", "liver_0001,A,test")
    assert len(list_cases(root, "A")) == 2


def test_several_channels_are_refused(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, ["a", "b"], channel_names={"0": "T2", "1": "ADC"})
    assert "names 2 channels" in refused(root)
    root = write_nnunet(tmp_path, ["a", "b"])
    write_scan(root / "imagesTr" / "a_0001.nii.gz")
    write_table(root, "a,A,train", "b,A,test")
    assert "case a has 2 files as its scan" in refused(root, "A")
    values = np.zeros((*SHAPE, 2), np.int16)
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), root / "imagesTr" / "b_0000.nii.gz")
    (root / "imagesTr" / "a_0001.nii.gz").unlink()
    case = next(case for case in list_cases(root, "A") if case.name == "b")
    with pytest.raises(DataError, match="4 dimensions"):
        load_volume(case, 1)


def test_a_listed_case_that_is_not_there(tmp_path: Path) -> None:
    listed = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in "ab"
    ]
    root = write_nnunet(tmp_path, ["a"], ["c"], channel="", training=listed)
    write_table(root, "a,A,train", "b,A,train", "c,A,test")
    assert "case b has no scan; expected imagesTr/b_0000.nii.gz" in refused(root, "A")


def test_a_case_in_both_folders_and_a_missing_mask(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, ["a", "b"], ["a"])
    assert "case a is in labelsTr and in labelsTs" in refused(root)
    root = write_nnunet(tmp_path / "other", ["a", "b"])
    (root / "labelsTr" / "b.nii.gz").unlink()
    write_table(root, "a,A,train", "b,A,test")
    assert "case b has no mask; expected labelsTr/b.nii.gz" in refused(root, "A")


def test_a_name_that_is_no_plain_one(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, ["a", "two words"])
    write_table(root, "a,A,train", "two words,A,test")
    assert "case two words: rename its files" in refused(root, "A")


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "2": "tumour", "1": "liver"},
        {"background": 0, "liver": 1, "tumour": 2},
    ],
)
def test_class_names_of_both_versions(tmp_path: Path, labels: dict[str, Any]) -> None:
    assert nnunet_class_names(write_nnunet(tmp_path, ["a"], labels=labels)) == ("liver", "tumour")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"background": 0, "whole": [1, 2], "core": 2}, "a region"),
        ({"background": 0, "liver": 1, "tumour": 3}, "without a gap"),
        ({"background": 0}, "without a gap"),
        ({"background": 0, "liver": 1, "ignore": 2}, "label 2 is 'ignore'"),
        ([], "without a gap"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, labels: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        nnunet_class_names(write_nnunet(tmp_path, ["a"], labels=labels))


def test_a_description_that_cannot_be_used(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, ["a"], dataset={"a": {"images": ["/x.nii.gz"], "label": "/y"}})
    assert "under 'dataset'" in refused(root)
    for text, said in (
        ("{", "cannot be read as JSON"),
        ("[]", "holds no object"),
        ('{"file_ending": ".mha"}', "file_ending is '.mha'; convert"),
    ):
        (root / "dataset.json").write_text(text)
        assert said in refused(root)
    (root / "dataset.json").unlink()
    assert "dataset.json: missing" in refused(root)


@pytest.mark.parametrize(
    ("described", "grey_values"),
    [
        ({"channel_names": {"0": "CT"}}, "site"),
        ({"channel_names": None, "modality": {"0": "CT"}}, "site"),
        ({"channel_names": None, "modality": "ct"}, "site"),
        ({"channel_names": {"0": "MRI"}}, "scan"),
        ({"channel_names": None}, "scan"),
    ],
)
def test_ct_alone_has_units(tmp_path: Path, described: Any, grey_values: str) -> None:
    assert nnunet_grey_values(write_nnunet(tmp_path, ["a"], **described)) == grey_values


def test_what_is_left_out_of_a_description_or_said_in_other_words(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, ["a"], ["b"], modality="CT", training=1, channel_names=None)
    assert sorted(given(root)) == ["a", "b"]


def test_files_of_macos_are_left_alone(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, ["a"], ["b"])
    (root / "imagesTr" / "._a_0000.nii.gz").touch()
    (root / "labelsTr" / "._a.nii.gz").touch()
    write_pair(root / "x.nii.gz", root / "y.nii.gz")
    assert sorted(given(root)) == ["a", "b"]
