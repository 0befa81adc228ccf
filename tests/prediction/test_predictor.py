"""A mask is the one that an evaluation of the same case scores, voxel for voxel."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from prediction_run import Run, train

from flap_nvflare.bundle.grey import choose_window
from flap_nvflare.bundle.trained import load_trained
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.scan import Scan, open_scan
from flap_nvflare.data.window import KITS_WINDOWS
from flap_nvflare.prediction.predictor import Predictor
from flap_nvflare.training import volume_scorer


def evaluated(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the site's own evaluation scores, by case."""
    found = {}
    score = volume_scorer.score_case

    def note(case: str, prediction: torch.Tensor, *rest: object) -> object:
        found[case] = prediction
        return score(case, prediction, *rest)

    monkeypatch.setattr(volume_scorer, "score_case", note)
    run.work.evaluate("test")
    return found


def predictor(run: Run, batch: int = 0) -> Predictor:
    trained = load_trained(run.adapter)
    by_site = trained.federation.grey_values == "site"
    options = {"site": "A", "data_root": run.scans} if by_site else {}
    window, _ = choose_window(trained.federation, **options)
    return Predictor(trained, window, "cpu", batch)


def image(run: Run, case: str) -> Path:
    return run.scans / case / "imaging.nii.gz"


@pytest.mark.parametrize(
    "changes",
    [{}, {"channels": "neighbours"}, {"method": "decoder"}, {"lora_blocks": 1}],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_the_mask_is_the_one_that_an_evaluation_scores(
    changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, **changes)
    expected = evaluated(run, monkeypatch)
    assert expected
    for case, mask in expected.items():
        found = predictor(run).mask(open_scan(image(run, case)))
        assert found.dtype == np.uint8
        assert np.array_equal(found, mask.numpy())
        assert len(np.unique(found)) > 1


def test_every_slice_is_run_once(run: Run) -> None:
    trained = load_trained(run.adapter)
    ready = Predictor(trained, KITS_WINDOWS["A"], "cpu", batch=2)
    seen: list[int] = []
    trained.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    done: list[int] = []
    ready.mask(open_scan(image(run, "case_00003")), done.append)
    assert seen == [2, 2, 2, 1]
    assert done == [2, 4, 6, 7]


def test_values_that_are_none_are_refused(run: Run) -> None:
    scan = open_scan(image(run, "case_00003"))
    broken = scan.stored.astype(np.float32)
    broken[-1, 3, 4] = np.nan
    with pytest.raises(DataError, match="1 voxels are NaN"):
        predictor(run).mask(Scan(scan.path, scan.image, broken))
    with pytest.raises(DataError, match="every voxel is 7"):
        predictor(run).mask(Scan(scan.path, scan.image, np.full_like(scan.stored, 7)))


def test_a_batch_below_one_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="batch is -1"):
        predictor(run, batch=-1)


def test_by_scan_the_network_sees_what_it_was_trained_on(
    run_by_scan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = predictor(run_by_scan)
    assert ready.window is None
    seen: list[torch.Tensor] = []
    ready._network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for case in run_by_scan.work.data.prepared("train"):
        seen.clear()
        ready.mask(open_scan(image(run_by_scan, case.name)))
        assert torch.equal(torch.cat(seen)[:, 0], case.images)
    expected = evaluated(run_by_scan, monkeypatch)
    for name, mask in expected.items():
        found = ready.mask(open_scan(image(run_by_scan, name)))
        assert np.array_equal(found, mask.numpy())
        assert len(np.unique(found)) > 1


def test_by_scan_the_scanners_gain_changes_no_mask(run_by_scan: Run, tmp_path: Path) -> None:
    scan = nib.load(image(run_by_scan, "case_00003"))
    # A power of two, so that no rounding differs either.
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj) * 4, scan.affine), tmp_path / "other.nii")
    one, other = (open_scan(Path(path)) for path in (scan.get_filename(), tmp_path / "other.nii"))
    ready = predictor(run_by_scan)
    assert ready.window_of(other).mean == 4 * ready.window_of(one).mean
    assert np.array_equal(ready.mask(other), ready.mask(one))


def test_a_window_goes_with_adapters_of_sites_alone(run: Run, run_by_scan: Run) -> None:
    with pytest.raises(ValueError, match="window is None, but grey_values is 'site'"):
        Predictor(load_trained(run.adapter), None, "cpu")
    with pytest.raises(ValueError, match=r"window is Window.*, but grey_values is 'scan'"):
        Predictor(load_trained(run_by_scan.adapter), KITS_WINDOWS["A"], "cpu")


def test_by_scan_one_value_is_refused(run_by_scan: Run) -> None:
    scan = open_scan(image(run_by_scan, "case_00003"))
    flat = np.zeros_like(scan.stored)
    flat[2:] = 9
    with pytest.raises(DataError, match=r"imaging.nii.gz: all of it that is not air has one value"):
        predictor(run_by_scan).mask(Scan(scan.path, scan.image, flat))
