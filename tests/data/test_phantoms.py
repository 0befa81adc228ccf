"""The knobs of synthetic scans: more cases and sites, readers that differ, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flap_nvflare.data.kits import DataError, read_kits, site_names
from flap_nvflare.data.phantom import phantom_case
from flap_nvflare.data.phantoms import FIRST_TEST, Phantoms, phantom_sites, write_phantoms
from flap_nvflare.data.scanners import PHANTOM_SITES, scanner_of
from flap_nvflare.data.volume import load_volume


def contents(root: Path, site: str) -> dict[str, tuple[bytes, bytes]]:
    cases = read_kits(root, site, 0.0, 0)
    return {
        f"{split}/{case.name}": (case.image.read_bytes(), case.label.read_bytes())
        for split in ("train", "test")
        for case in getattr(cases, split)
    }


def test_more_training_cases_move_no_other_case(tmp_path: Path) -> None:
    few = write_phantoms(tmp_path / "few", Phantoms(train=1, test=1), only="D")
    more = write_phantoms(tmp_path / "more", Phantoms(train=2, test=1), only="D")
    first, second = contents(few, "D"), contents(more, "D")
    assert sorted(first) == ["test/case_D_1000", "train/case_D_0000"]
    assert first.items() <= second.items()
    assert sorted(second.keys() - first.keys()) == ["train/case_D_0001"]
    # The first training case is the described one, and the first test case shows a tumour.
    assert (phantom_case("D", FIRST_TEST, 0)[1] == 2).sum() >= 10


def test_any_number_of_sites_reads_as_kits(tmp_path: Path) -> None:
    knobs = Phantoms(sites=30, train=1, test=1, seed=4)
    root = write_phantoms(tmp_path, knobs, only=["S030"])
    assert site_names(root) == list(phantom_sites(knobs))
    assert len(phantom_sites(knobs)) == 30
    cases = read_kits(root, "S030", 0.0, 0)
    assert [case.name for case in cases.train + cases.test] == ["case_S030_0000", "case_S030_1000"]
    assert load_volume(cases.train[0], 2).label.any()
    with pytest.raises(DataError, match="S031"):
        write_phantoms(tmp_path, knobs, only=["S031"])


def test_scanners_of_numbered_sites_lie_between_the_described_ones() -> None:
    drawn = [scanner_of(f"S{number:03d}", 2, 0) for number in range(1, 60)]
    for name in ("contrast", "noise", "grain", "shift", "scale", "tumours"):
        described = [getattr(site, name) for site in PHANTOM_SITES.values()]
        values = [getattr(site, name) for site in drawn]
        assert min(described) <= min(values) < max(values) <= max(described)
    assert len({(site.noise, site.scale) for site in drawn}) == len(drawn)
    assert scanner_of("S001", 2, 0) != scanner_of("S001", 2, 1)


def test_the_manifest_says_what_differs(tmp_path: Path) -> None:
    write_phantoms(tmp_path, Phantoms(train=2, labels=2.5), only=[])
    manifest = json.loads((tmp_path / "PHANTOM.json").read_text())
    assert manifest == {"synthetic": True, "version": 2, "seed": 0, "train": 2, "labels": 2.5}
    with pytest.raises(DataError, match=r"'train': 3.*name another folder"):
        write_phantoms(tmp_path, Phantoms(train=3, labels=2.5), only=[])


def test_readers_of_neighbouring_sites_draw_wide_tight_and_true(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, Phantoms(train=1, test=1, labels=3.0), only="ABC")
    for site, sign in (("A", 1), ("B", -1), ("C", 0)):
        cases = read_kits(root, site, 0.0, 0)
        for case, index in ((cases.train[0], 0), (cases.test[0], FIRST_TEST)):
            image, label, _ = phantom_case(site, index, 0)
            volume = load_volume(case, 2)
            assert np.array_equal(volume.image, image)
            assert np.sign(int((volume.label > 0).sum()) - int((label > 0).sum())) == sign


@pytest.mark.parametrize(
    ("knobs", "mend"),
    [
        ({"kind": "knees"}, "kind is 'knees'; give one of kits, ixi, prostate"),
        ({"modality": "pet"}, "modality is 'pet'; give one of ct, mr, ultrasound, xray"),
        ({"sites": 201}, "sites is 201; give a whole number from 0 to 200"),
        ({"train": -1}, "train is -1; give a whole number from 0"),
        ({"test": 1.5}, "test is 1.5; give a whole number"),
        ({"seed": True}, "seed is True; give a whole number from 0"),
        ({"labels": -0.1}, "labels is -0.1; give a number from 0 to 10"),
        ({"difference": float("nan")}, "difference is nan; give a number"),
    ],
)
def test_a_knob_that_is_none_is_refused(knobs: dict[str, object], mend: str) -> None:
    with pytest.raises(DataError, match=mend):
        Phantoms(**knobs)  # type: ignore[arg-type]
