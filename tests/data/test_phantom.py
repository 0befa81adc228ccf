"""Synthetic scans: the layout, the bytes, the shapes, and who may write where."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import label as components

from flap_nvflare.data.kits import DataError, read_kits
from flap_nvflare.data.phantom import PHANTOM_SITES, phantom_case, write_phantom
from flap_nvflare.data.volume import load_volume

COUNTS = {"A": (4, 2), "B": (5, 2), "C": (4, 2), "D": (3, 2), "E": (5, 2), "F": (8, 3)}


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_folder_reads_as_kits(phantom_root: Path) -> None:
    cases = read_kits(phantom_root, "D", 0.25, 0)
    assert [len(part) for part in (cases.train, cases.validation, cases.test)] == [2, 1, 2]
    for case in cases.train + cases.test:
        volume = load_volume(case, 2)
        slices, height, width = volume.image.shape
        assert 24 <= slices <= 32
        assert (height, width) == (128, 128)
        assert 3 <= volume.spacing[0] <= 6
        assert 2.3 <= volume.spacing[1] == volume.spacing[2] <= 2.6
        assert set(np.unique(volume.label)) <= {0, 1, 2}
        assert (volume.label == 1).any()
        # Nothing had to be turned: the file itself has the slices first.
        stored = nib.load(case.image)
        assert stored.shape == volume.image.shape
        assert stored.get_data_dtype() == np.int16
        assert np.array_equal(np.asarray(stored.dataobj), volume.image)


def test_the_table_lists_all_sites(phantom_root: Path) -> None:
    lines = (phantom_root / "thresholded_sites.csv").read_text().splitlines()
    assert lines[0] == "case_ids,site_ids,train_test_split,train_test_split_silo"
    assert lines[1] == "case_00000,0,train,train_0"
    rows = [line.split(",") for line in lines[1:]]
    for number, (site, counts) in enumerate(COUNTS.items()):
        own = [row for row in rows if row[1] == str(number)]
        assert tuple(sum(row[2] == s for row in own) for s in ("train", "test")) == counts
        assert (PHANTOM_SITES[site].train, PHANTOM_SITES[site].test) == counts
    assert json.loads((phantom_root / "PHANTOM.json").read_text())["seed"] == 0
    with pytest.raises(DataError, match="case_00000"):
        read_kits(phantom_root, "A", 0.0, 0)


def test_every_site_can_be_trained_and_tested_on_tumours() -> None:
    """The first training case and the first test case of every site show one."""
    for site, (train, _) in COUNTS.items():
        for number in (0, train):
            assert (phantom_case(site, number, 0)[1] == 2).sum() >= 10


def test_anatomy_is_in_its_place() -> None:
    """Each kidney is one bent piece beside the spine, of a kidney's volume and grey."""
    for site, number in (("A", 0), ("D", 0), ("F", 1)):
        image, mask, affine = phantom_case(site, number, 3)
        assert affine[2, 0] < 0
        sizes = np.abs(affine[:3, :3]).max(0)
        foreground = mask > 0
        pieces, count = components(foreground)
        volumes = np.bincount(pieces.ravel())[1:] * sizes.prod() / 1000
        assert 1 <= (volumes > 30).sum() <= 2
        assert volumes.max() < 400  # ml
        inside = image[mask == 1].astype(float)
        assert -20 < np.median(inside) < 300
        assert inside.std() > 5
        # Air lies outside, fat and soft tissue inside; the front half holds no kidney's centre.
        assert np.median(image[:, :4, :4]) < -900
        assert (image > 250).mean() > 0.002
        rows = np.nonzero(foreground)[1]
        assert rows.mean() > 64
        # A solid convex shape would fill the box round its slice like an ellipse does.
        assert count < 20


def test_cases_differ_and_sites_look_different() -> None:
    medians = {}
    for site in COUNTS:
        image, mask, _ = phantom_case(site, 0, 0)
        medians[site] = np.median(image[mask == 1])
    assert max(medians.values()) - min(medians.values()) > 40
    first, second = phantom_case("A", 0, 0)[1], phantom_case("A", 1, 0)[1]
    smaller = min(len(first), len(second))
    a, b = first[:smaller] == 1, second[:smaller] == 1
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) < 0.8


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, phantom_root: Path) -> None:
    write_phantom(tmp_path / "again", seed=0, sites=["D"])
    assert digest(tmp_path / "again") == digest(phantom_root)
    assert not np.array_equal(phantom_case("D", 0, 0)[0], phantom_case("D", 0, 1)[0])


def test_the_default_cases_are_as_they_were() -> None:
    """Drawing in another order would change them all; another machine's rounding a voxel or two."""
    for case, kidney, tumour, mean, deviation in (
        (("A", 0, 0, 1.0), 5965, 1121, -496.937, 488.029),
        (("B", 1, 3, 3.0), 9318, 771, -548.244, 515.614),
    ):
        image, mask, _ = phantom_case(*case)
        assert (mask == 1).sum() == pytest.approx(kidney, abs=3)
        assert (mask == 2).sum() == pytest.approx(tumour, abs=3)
        assert image.mean() == pytest.approx(mean, abs=0.05)
        assert image.std() == pytest.approx(deviation, abs=0.05)


def test_a_second_call_keeps_what_is_there(phantom_root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in phantom_root.glob("case_*/*")}
    heard: list[object] = []
    write_phantom(phantom_root, seed=0, sites=["D"], progress=lambda *told: heard.append(told))
    assert {path: path.stat().st_mtime_ns for path in phantom_root.glob("case_*/*")} == before
    assert len(heard) == 5


def test_another_seed_is_refused(phantom_root: Path) -> None:
    with pytest.raises(DataError, match=r"PHANTOM\.json"):
        write_phantom(phantom_root, seed=1, sites=["D"])


def test_real_scans_are_never_touched(tmp_path: Path) -> None:
    scan = tmp_path / "case_00000" / "imaging.nii.gz"
    scan.parent.mkdir()
    scan.write_bytes(b"a patient")
    with pytest.raises(DataError, match="case_00000"):
        write_phantom(tmp_path, sites=["A"])
    assert digest(tmp_path) == {
        "case_00000/imaging.nii.gz": hashlib.sha256(b"a patient").hexdigest()
    }


def test_foreign_files_beside_a_phantom_are_refused(tmp_path: Path, phantom_root: Path) -> None:
    root = tmp_path / "kits"
    root.mkdir()
    (root / "PHANTOM.json").write_bytes((phantom_root / "PHANTOM.json").read_bytes())
    (root / "case_99999").mkdir()
    with pytest.raises(DataError, match="case_99999"):
        write_phantom(root, sites=["D"])


def test_an_unknown_site_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'Z'"):
        write_phantom(tmp_path / "kits", sites=["Z"])
    assert not (tmp_path / "kits").exists()


def test_processes_may_write_at_the_same_time(tmp_path: Path, phantom_root: Path) -> None:
    """Three write the same site, one another: whole cases, the bytes of a single writer."""
    program = (
        "import sys; from flap_nvflare.data.phantom import write_phantom;"
        "write_phantom(sys.argv[1], seed=0, sites=[sys.argv[2]])"
    )
    root = tmp_path / "kits"
    jobs = [
        subprocess.Popen([sys.executable, "-c", program, str(root), site], stderr=subprocess.PIPE)
        for site in ("D", "D", "D", "A")
    ]
    assert [(job.communicate()[1], job.returncode) for job in jobs] == [(b"", 0)] * 4
    written = digest(root)
    assert {name: written[name] for name in digest(phantom_root)} == digest(phantom_root)
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert len(read_kits(root, "A", 0.0, 0).train) == 4


def test_writing_imports_neither_torch_nor_monai() -> None:
    program = (
        "import sys; import flap_nvflare.data.phantom, flap_nvflare.data.kits,"
        "flap_nvflare.data.volume, flap_nvflare.data.window;"
        "print([name for name in ('torch', 'monai', 'nvflare') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr


def test_a_case_is_drawn_quickly() -> None:
    phantom_case("A", 0, 0)
    start = time.process_time()
    phantom_case("A", 1, 0)
    # 0.15 s alone on a core; the bound leaves room for a busy machine.
    assert time.process_time() - start < 0.8


def test_scanners_may_be_alike_or_far_apart() -> None:
    alike = {
        (one.contrast, one.noise, one.grain, one.shift, one.scale)
        for one in (site.exaggerated(0) for site in PHANTOM_SITES.values())
    }
    assert len(alike) == 1
    near, far = PHANTOM_SITES["E"].exaggerated(1), PHANTOM_SITES["E"].exaggerated(3)
    assert near.noise == pytest.approx(19)
    assert (far.contrast, far.shift) == (pytest.approx(0.25), pytest.approx(75))
    assert far.noise > 1.8 * near.noise
    first, _, _ = phantom_case("E", 0, seed=0)
    other, label, _ = phantom_case("E", 0, seed=0, difference=3)
    assert (first != other).any()
    assert (label == phantom_case("E", 0, seed=0)[1]).all()


def test_phantoms_of_another_difference_are_not_mixed(tmp_path: Path) -> None:
    write_phantom(tmp_path, sites=["D"])
    with pytest.raises(DataError, match="'difference': 3"):
        write_phantom(tmp_path, sites=["D"], difference=3)
    with pytest.raises(DataError, match="from 0 to 10"):
        write_phantom(tmp_path / "other", difference=-1)
