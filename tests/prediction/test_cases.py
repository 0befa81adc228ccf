"""One scan after the other: what is kept, what is refused, and that a bad one harms no other."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from prediction_run import Run

from flap_nvflare.bundle.trained import load_trained
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.window import KITS_WINDOWS, Window
from flap_nvflare.prediction.cases import Cases, Done, require_writable, sizes
from flap_nvflare.prediction.inputs import find_inputs
from flap_nvflare.prediction.masks import read_mask
from flap_nvflare.prediction.predictor import Predictor


def cases(run: Run, out: Path, window: Window = KITS_WINDOWS["A"], **options: bool) -> Cases:
    return Cases(
        Predictor(load_trained(run.adapter), window, "cpu"), ("adapter", "base"), out, **options
    )


def done(run: Run, scans: Path, out: Path, **options: object) -> dict[str, Done]:
    found = cases(run, out, **options).run(find_inputs(scans))  # type: ignore[arg-type]
    return {str(one.file.relative_to(scans)): one for one in found}


@pytest.fixture
def scans(run: Run, tmp_path: Path) -> Path:
    """Two whole scans, and one of each kind that cannot be used."""
    root = tmp_path / "scans"
    root.mkdir()
    for name, number in (("a", 0), ("z", 3)):
        scan = nib.load(run.scans / f"case_{number:05d}" / "imaging.nii.gz")
        nib.save(scan, root / f"{name}.nii.gz")
    voxels = np.random.default_rng(0).normal(0, 50, (4, 4, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(np.stack([voxels, voxels], axis=3), np.eye(4)), root / "four.nii.gz")
    nib.save(nib.Nifti1Image(voxels[0], np.eye(4)), root / "two.nii.gz")
    nib.save(nib.Nifti1Image(voxels * 0, np.eye(4)), root / "empty.nii.gz")
    voxels[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / "nan.nii.gz")
    (root / "cut.nii.gz").write_bytes((root / "a.nii.gz").read_bytes()[:-100])
    (root / "text.nii.gz").write_text("no scan")
    return root


def test_a_bad_scan_keeps_no_other_from_its_mask(run: Run, scans: Path, tmp_path: Path) -> None:
    found = done(run, scans, tmp_path / "out")
    expected = {
        "four": "has 4 dimensions",
        "two": "has 2 dimensions",
        "empty": "empty, every voxel is 0",
        "nan": "1 voxels are NaN",
        "cut": "damaged",
        "text": "damaged or not NIfTI",
    }
    for name, message in expected.items():
        one = found[f"{name}.nii.gz"]
        assert one.status == "failed"
        assert str(one.file) in one.error
        assert message in one.error
        assert "\n" not in one.error
    assert {name for name, one in found.items() if one.status == "written"} == {
        "a.nii.gz",
        "z.nii.gz",
    }
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "a_mask.nii.gz",
        "z_mask.nii.gz",
    ]


def test_a_folder_goes_on_where_it_stopped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = done(run, run.scans, out)
    assert {one.status for one in first.values()} == {"written"}
    assert len(first) == 8
    (out / "case_00002" / "imaging_mask.nii.gz").unlink()
    second = done(run, run.scans, out)
    again = "case_00002/imaging.nii.gz"
    assert {name for name, one in second.items() if one.status == "written"} == {again}
    assert second[again].classes == first[again].classes
    kept = "case_00000/imaging.nii.gz"
    assert second[kept].classes == first[kept].classes


def test_a_mask_of_other_settings_is_refused_or_made_anew(
    run: Run, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = done(run, scans, out)["a.nii.gz"]
    before = read_mask(out / "a_mask.nii.gz")
    other = Window(100.0, 160.0, 150.0, 5.0)
    refused = done(run, scans, out, window=other)["a.nii.gz"]
    assert refused.status == "failed"
    assert "--overwrite" in refused.error
    anew = done(run, scans, out, window=other, overwrite=True)["a.nii.gz"]
    assert anew.status == "written"
    assert anew.classes != first.classes
    assert not np.array_equal(read_mask(out / "a_mask.nii.gz"), before)


def test_overlays_are_drawn_also_beside_kept_masks(run: Run, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(run, scans, out)
    assert not (out / "a_overlay.png").exists()
    assert done(run, scans, out, overlays=True)["a.nii.gz"].status == "kept"
    assert (out / "a_overlay.png").read_bytes().startswith(b"\x89PNG")


def test_progress_tells_every_batch(run: Run, tmp_path: Path) -> None:
    inputs = find_inputs(run.scans / "case_00000" / "imaging.nii.gz")
    told: list[tuple] = []
    list(cases(run, tmp_path).run(inputs, lambda *figures: told.append(figures)))
    assert told == [("imaging", 3, 7), ("imaging", 6, 7), ("imaging", 7, 7)]


def test_sizes_are_voxels_and_millilitres() -> None:
    mask = np.zeros((2, 3, 4), np.uint8)
    mask[0, 0] = 1
    mask[1, 0, 0] = 3
    assert sizes(mask, ["a", "b", "c"], 0.5) == {
        "a": {"voxels": 4, "ml": 2.0},
        "b": {"voxels": 0, "ml": 0.0},
        "c": {"voxels": 1, "ml": 0.5},
    }


def test_what_json_holds() -> None:
    failed = Done(Path("a.nii"), "failed", error="no")
    assert failed.to_dict() == {"file": "a.nii", "status": "failed", "error": "no"}
    whole = Done(Path("a.nii"), "written", Path("m"), (1, 2, 3), 0.25, {"a": {"voxels": 0}})
    assert json.loads(json.dumps(whole.to_dict()))["shape"] == [1, 2, 3]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/out: cannot be written to"):
        require_writable(tmp_path / "file" / "out")
