"""Which cases of the table a site gets, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits_files import HEADER, site_lines, write_table

from flap_nvflare.data.kits import DataError, SiteCases, read_kits

FED_KITS = {"A": (9, 3), "B": (11, 3), "C": (9, 3), "D": (9, 3), "E": (12, 4), "F": (24, 6)}


def names(cases: SiteCases, split: str) -> list[str]:
    return [case.name for case in getattr(cases, split)]


def test_every_site_of_fed_kits_gets_its_published_number_of_cases(tmp_path: Path) -> None:
    lines: list[str] = []
    for number, (train, test) in enumerate(FED_KITS.values()):
        lines += site_lines(number, train, test, first=len(lines))
    write_table(tmp_path, lines)
    for site, counts in FED_KITS.items():
        cases = read_kits(tmp_path, site, 0.0, 0)
        assert (len(cases.train), len(cases.test)) == counts
        assert cases.validation == ()
    assert names(read_kits(tmp_path, "B", 0.0, 0), "train")[0] == "case_00012"


def test_a_case_points_at_its_two_files(tmp_path: Path) -> None:
    write_table(tmp_path, site_lines(0, 1, 1))
    case = read_kits(tmp_path, "A", 0.0, 0).test[0]
    assert case.image == tmp_path / "case_00001" / "imaging.nii.gz"
    assert case.label == tmp_path / "case_00001" / "segmentation.nii.gz"


@pytest.mark.parametrize("written", ["1", "B", "b"])
@pytest.mark.parametrize("asked", ["B", "b", "1", 1])
def test_a_site_is_known_by_letter_and_by_number(
    tmp_path: Path, written: str, asked: str | int
) -> None:
    write_table(tmp_path, site_lines(written, 1, 1))
    assert names(read_kits(tmp_path, asked, 0.0, 0), "train") == ["case_00000"]


def test_the_sites_own_split_decides(tmp_path: Path) -> None:
    write_table(tmp_path, ["case_0,0,train,test_0", "case_1,0,test,train_0"])
    cases = read_kits(tmp_path, "A", 0.0, 0)
    assert names(cases, "train") == ["case_1"]
    assert names(cases, "test") == ["case_0"]


def test_columns_may_stand_in_any_order_with_blanks_and_a_byte_order_mark(tmp_path: Path) -> None:
    write_table(tmp_path, ["case_0,train,A,train", "case_1,test,A,test"])
    text = "\ufeffcase_ids, train_test_split_silo, site_ids, train_test_split\n"
    table = tmp_path / "thresholded_sites.csv"
    table.write_text(text + "case_0, train, A, train\ncase_1, test, A, test\n", encoding="utf-8")
    assert names(read_kits(tmp_path, "A", 0.0, 0), "test") == ["case_1"]


@pytest.mark.parametrize(
    ("train", "fraction", "held_out"),
    [(9, 0.25, 2), (24, 0.25, 6), (3, 0.01, 1), (2, 0.25, 0), (4, 0.9, 3), (9, 0.0, 0)],
)
def test_the_share_of_validation_cases(
    tmp_path: Path, train: int, fraction: float, held_out: int
) -> None:
    write_table(tmp_path, site_lines(0, train, 2))
    cases = read_kits(tmp_path, "A", fraction, 0)
    assert (len(cases.train), len(cases.validation)) == (train - held_out, held_out)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fraction=st.floats(0, 0.9), seed=st.integers(0, 2**31 - 1))
def test_splits_never_overlap_and_repeat(tmp_path: Path, fraction: float, seed: int) -> None:
    write_table(tmp_path, site_lines(0, 6, 3))
    cases = read_kits(tmp_path, "A", fraction, seed)
    assert cases == read_kits(tmp_path, "A", fraction, seed)
    assert names(cases, "test") == ["case_00006", "case_00007", "case_00008"]
    together = names(cases, "train") + names(cases, "validation")
    assert sorted(together) == [f"case_{number:05d}" for number in range(6)]
    assert cases.train


def test_the_seed_chooses_the_validation_cases(tmp_path: Path) -> None:
    write_table(tmp_path, site_lines(0, 8, 1))
    chosen = {read_kits(tmp_path, "A", 0.25, seed).validation for seed in range(12)}
    assert len(chosen) > 3


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["case_0,5,train,train_5", "case_1,5,test,test_5"], r"'A'.*\['F'\]"),
        (site_lines(0, 2, 0), "no test case"),
        (site_lines(0, 0, 2), "no train case"),
        (["case_0,0,train,validation_0"], "validation_0"),
        (["case_0,0,train,train_3"], "train_3"),
        (["case_0,0,train,train_0", "case_0,0,test,test_0"], "case_0.*line 2"),
        (["../case_0,0,train,train_0", "case_1,0,test,test_0"], r"\.\./case_0"),
        (["/etc,0,train,train_0", "case_1,0,test,test_0"], "/etc"),
        (["..,0,train,train_0", "case_1,0,test,test_0"], r"'\.\.'"),
        (["case\\..\\x,0,train,train_0", "case_1,0,test,test_0"], "refused"),
        ([",0,train,train_0", "case_1,0,test,test_0"], "''"),
    ],
)
def test_a_wrong_table_is_refused_by_name(tmp_path: Path, lines: list[str], found: str) -> None:
    write_table(tmp_path, lines)
    with pytest.raises(DataError, match=found) as caught:
        read_kits(tmp_path, "A", 0.25, 0)
    assert "thresholded_sites.csv" in str(caught.value)


def test_missing_root_table_and_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        read_kits(tmp_path / "nowhere", "A", 0.0, 0)
    with pytest.raises(DataError, match=r"thresholded_sites\.csv: missing"):
        read_kits(tmp_path, "A", 0.0, 0)
    write_table(tmp_path, ["case_0,0"], header="case_ids,site_ids")
    with pytest.raises(DataError, match="train_test_split_silo"):
        read_kits(tmp_path, "A", 0.0, 0)


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thresholded_sites.csv").write_bytes(HEADER.encode() + b"\n\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="thresholded_sites"):
        read_kits(tmp_path, "A", 0.0, 0)


@pytest.mark.parametrize("gone", ["imaging.nii.gz", "segmentation.nii.gz", ""])
def test_a_missing_file_or_folder_is_named(tmp_path: Path, gone: str) -> None:
    write_table(tmp_path, site_lines(0, 1, 1))
    folder = tmp_path / "case_00001"
    for file in list(folder.iterdir()) if not gone else [folder / gone]:
        file.unlink()
    if not gone:
        folder.rmdir()
    with pytest.raises(DataError, match=f"case_00001.*{gone}"):
        read_kits(tmp_path, "A", 0.0, 0)


def test_a_share_outside_its_range_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, site_lines(0, 4, 1))
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="validation_fraction"):
            read_kits(tmp_path, "A", share, 0)
