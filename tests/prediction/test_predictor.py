"""A mask is the one that an evaluation of the same case scores, voxel for voxel."""

from __future__ import annotations

from pathlib import Path

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
    window, _ = choose_window(trained.federation, site="A", data_root=run.scans)
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
