"""The command as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_series
from prediction_run import Run

from flap_nvflare.cli import main


def call(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


def test_a_file_by_a_runs_folder(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = run.scans / "case_00003" / "imaging.nii.gz"
    (run.adapter.parent / "adapter_best.safetensors").write_bytes(run.adapter.read_bytes())
    out = tmp_path / "out"
    assert call(scan, "--adapter", run.adapter.parent, "--out", out, "--site", "A") == 0
    shown = capsys.readouterr()
    assert "imaging_mask.nii.gz: 7 x 40 x 36, kidney" in shown.out
    assert "Grey values: -66 to 208 HU, mean 100.5, deviation 61.7 (site A of Fed-KiTS2019)" in (
        shown.err
    )
    mask, image = nib.load(out / "imaging_mask.nii.gz"), nib.load(scan)
    assert mask.shape == image.shape
    assert np.allclose(mask.affine, image.affine)


def test_a_folder_with_a_bad_scan_as_json(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    write = (run.scans / "case_00000" / "imaging.nii.gz").read_bytes()
    for name, content in (("a", b"no scan"), ("b", write)):
        scans.mkdir(exist_ok=True)
        (scans / f"{name}.nii.gz").write_bytes(content)
    options = ("--adapter", run.adapter, "--json", "--overlays")
    assert call(scans, *options, "--out", tmp_path / "out") == 1
    shown = capsys.readouterr()
    bad, good = (json.loads(line) for line in shown.out.splitlines())
    assert (bad["status"], good["status"]) == ("failed", "written")
    assert good["shape"] == [7, 40, 36]
    mask = np.asarray(nib.load(good["mask"]).dataobj)
    assert good["classes"]["kidney"]["voxels"] == int((mask == 1).sum())
    assert good["classes"]["kidney"]["ml"] == pytest.approx(int((mask == 1).sum()) * 0.003)
    assert "mean over the sites" in shown.err
    assert f"failed: {scans / 'a.nii.gz'}: damaged" in shown.err
    assert "1 of 2 scans have masks" in shown.err
    assert (tmp_path / "out" / "b_overlay.png").is_file()


def test_a_series_gives_the_mask_of_the_same_scan_as_nifti(run: Run, tmp_path: Path) -> None:
    scan = nib.load(run.scans / "case_00003" / "imaging.nii.gz")
    voxels = np.asarray(scan.dataobj)  # from head to feet; the file's rows run to the front
    head = np.array([5.0, 6.0, 70.0])
    write_series(
        tmp_path / "ct", voxels, origin=tuple(head), step=np.array([0, 0, -3.0]), intercept=0.0
    )
    affine = np.array([[0, 0, -0.8, -5], [0, -0.7, 0, -6], [-3, 0, 0, 70], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "ct.nii.gz")
    for source in ("ct", "ct.nii.gz"):
        out = tmp_path / f"out_{source}"
        assert call(tmp_path / source, "--adapter", run.adapter, "--out", out) == 0
    of_series, of_file = (
        nib.as_closest_canonical(nib.load(tmp_path / f"out_{source}" / "ct_mask.nii.gz"))
        for source in ("ct", "ct.nii.gz")
    )
    assert np.allclose(of_series.affine, of_file.affine)
    assert np.array_equal(np.asarray(of_series.dataobj), np.asarray(of_file.dataobj))
    assert np.asarray(of_file.dataobj).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "none"], "none: there is no such adapter"),
        (["--window", "5", "1", "0", "1"], "low < high"),
        (["--site", "Q"], "--site Q is none of Fed-KiTS2019"),
        (["--batch", "-2"], "batch is -2"),
        (["--device", "gpu"], "'gpu' is unknown to torch; give cpu"),
        (["--device", "cuda:99"], "'cuda:99' is not there"),
        (["--checkpoint", "none.pth"], "none.pth"),
    ],
)
def test_a_wrong_option_is_one_line(
    run: Run, tmp_path: Path, options: list, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [run.scans, "--adapter", run.adapter, "--out", tmp_path / "out", *options]
    assert call(*arguments) == 1
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("flap-nvflare predict: ")


def test_an_adapter_by_scan_needs_no_window_and_takes_none(
    run_by_scan: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = run_by_scan.scans / "case_00003" / "imaging.nii.gz"
    asked = (scan, "--adapter", run_by_scan.adapter, "--out", tmp_path, "--overlays")
    assert call(*asked) == 0
    assert "Grey values: of each scan itself\n" in capsys.readouterr().err
    assert (tmp_path / "imaging_overlay.png").is_file()
    assert call(*asked) == 0
    assert "imaging_mask.nii.gz (kept)" in capsys.readouterr().out
    for option in (
        ("--window", 0, 1, 0, 1),
        ("--site", "A"),
        ("--data-root", run_by_scan.scans, "--site", "A"),
    ):
        assert call(*asked, *option) == 1
        error = capsys.readouterr().err.splitlines()
        assert "every scan scaled by itself, so there is no window to choose" in error[-1]
