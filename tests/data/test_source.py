"""A hospital's own list of its scans: what it may return, and how it is told what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from scan_files import write_sites

from flap_nvflare.bundle.builders import make_site
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.kits import read_kits
from flap_nvflare.data.source import list_source, read_cases
from flap_nvflare.settings import Federation, Site
from flap_nvflare.site.overlay import overlay_folder
from flap_nvflare.training.site_data import SiteData

HEAD = "from flap_nvflare.data.kits import ListedCase\n"
TWO = """
def site_cases(data_root, site):
    def case(name, split):
        return ListedCase(name, data_root / f"{name}.nii.gz", data_root / f"{name}_m.nii", split)
    return [case("b", "train"), case("a", "train"), case("t", "test")]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "scans"
    root.mkdir()
    for name in "abt":
        (root / f"{name}.nii.gz").touch()
        (root / f"{name}_m.nii").touch()
    return root


def source(folder: Path, text: str) -> Path:
    path = folder / "site_data.py"
    path.write_text(HEAD + text, encoding="utf-8")
    return path


def test_cases_come_in_order_of_their_names(root: Path, tmp_path: Path) -> None:
    found = read_cases(root, "A", 0.0, 0, source(tmp_path, TWO))
    assert [case.name for case in found.train] == ["a", "b"]
    assert found.test[0].image == root / "t.nii.gz"
    assert type(found.test[0]).__name__ == "Case"


def test_the_overlays_own_file_lists_the_layout_of_kits(tmp_path: Path) -> None:
    write_sites(tmp_path, ("A", "B"))
    for seed in (0, 1):
        found = read_cases(tmp_path, "B", 0.4, seed, overlay_folder() / "site_data.py")
        assert found == read_kits(tmp_path, "B", 0.4, seed)


def test_a_site_trains_on_what_its_file_lists(tmp_path: Path) -> None:
    write_sites(tmp_path / "scans", ("A",))
    text = """
from flap_nvflare.data.kits import list_kits
def site_cases(data_root, site):
    return [case for case in list_kits(data_root, "A") if not case.name.endswith("1")]
"""
    site = Site("elsewhere", tmp_path / "scans", data_source=source(tmp_path, text))
    cases = SiteData(Federation(image_size=32, validation_fraction=0.0), site).cases
    assert [case.name for case in cases.train] == ["case_00000", "case_00002"]


def test_the_site_and_its_folder_are_told(root: Path, tmp_path: Path) -> None:
    asserts = "    assert (site, data_root.name) == ('A', 'scans')\n"
    text = TWO.replace("    def case(", f"{asserts}    def case(", 1)
    assert len(list_source(source(tmp_path, text), root, "A")) == 3
    with pytest.raises(DataError, match="site_cases failed: AssertionError"):
        list_source(source(tmp_path, text), root, "B")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("def site_cases", "def cases", "no function site_cases(data_root, site)"),
        ("def site_cases(data_root, site):", "def site_cases(data_root, site)", "SyntaxError"),
        ("def site_cases", "1 / 0\ndef site_cases", "cannot be run: ZeroDivisionError"),
        ("    return [case(", "    raise OSError('no disk')\n    return [case(", "no disk"),
        ("    return [case(", "    return None\n    return [case(", "returned None; return a list"),
        ('case("b", "train")', '"b"', "lists 'b'; make each case a ListedCase"),
        ('"b", "train"', '"a", "train"', "case 'a' is listed twice"),
        ('"b", "train"', '"b", "validation"', "its split is 'validation'"),
        ('"t", "test"', '"t", "train"', "lists no test case for site 'A'"),
        ("name, data_root /", "'../x', data_root /", "case '../x': give a plain name"),
        ("name, data_root /", "7, data_root /", "case 7: give a plain name"),
        ("{name}.nii.gz", "{name}.png", "b.png is no NIfTI file"),
        ("{name}.nii.gz", "{name}x.nii.gz", "missing; put the image of"),
        ("{name}_m.nii", "{name}.nii.gz", "each file is the scan or the mask of one case"),
        ("{name}_m.nii", "../scans2/{name}_m.nii", "leads out of"),
        ('data_root / f"{name}_m.nii"', 'f"{name}_m.nii"', "give a pathlib.Path"),
    ],
)
def test_what_it_may_not_return_is_named(
    root: Path, tmp_path: Path, before: str, after: str, said: str
) -> None:
    assert before in TWO
    path = source(tmp_path, TWO.replace(before, after))
    with pytest.raises(DataError) as caught:
        list_source(path, root, "A")
    assert said in str(caught.value)


def test_a_link_may_not_lead_out_of_the_folder(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "other.nii.gz"
    secret.touch()
    (root / "a.nii.gz").unlink()
    (root / "a.nii.gz").symlink_to(secret)
    with pytest.raises(DataError, match="leads out of"):
        list_source(source(tmp_path, TWO), root, "A")
    (root / "a.nii.gz").unlink()
    (root / "real.nii.gz").touch()
    (root / "a.nii.gz").symlink_to(root / "real.nii.gz")
    assert len(list_source(source(tmp_path, TWO), root, "A")) == 3


def test_one_scan_of_two_names_is_found_through_links(root: Path, tmp_path: Path) -> None:
    (root / "a.nii.gz").unlink()
    (root / "a.nii.gz").symlink_to(root / "t.nii.gz")
    with pytest.raises(DataError, match="is listed for"):
        list_source(source(tmp_path, TWO), root, "A")


def test_a_missing_folder_or_file_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; 'flap-nvflare site init' writes one"):
        list_source(tmp_path / "none.py", root, "A")
    with pytest.raises(DataError, match="no such folder"):
        list_source(source(tmp_path, TWO), tmp_path / "none", "A")
    text = tmp_path / "site_data.txt"
    text.touch()
    with pytest.raises(DataError, match=r"must end in \.py"):
        list_source(text, root, "A")


def test_a_site_without_a_federation_names_its_file_as_well(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path, TWO)
    monkeypatch.delenv("FLAP_DATA_SOURCE", raising=False)
    assert make_site("A", root).data_source is None
    assert make_site("A", root, data_source=str(path)).data_source == path
    monkeypatch.setenv("FLAP_DATA_SOURCE", str(path))
    assert make_site("A", root).data_source == path
