from __future__ import annotations

import json

import pytest
import torch

from flap_nvflare.training.metrics import score_case
from flap_nvflare.training.scores import CaseScore, SiteScore

MM = (1.0, 1.0, 1.0)


def row(*values: int) -> torch.Tensor:
    """A volume of one slice with one row."""
    return torch.tensor(values, dtype=torch.uint8).reshape(1, 1, -1)


def test_dice_by_hand_for_each_class() -> None:
    score = score_case("c", row(1, 1, 1, 2, 0), row(1, 1, 2, 2, 2), 2, MM)
    # Class 1: 2 shared, 3 + 2 voxels. Class 2: 1 shared, 1 + 3.
    assert score.dice == (pytest.approx(4 / 5), pytest.approx(2 / 4))
    assert score.dice_paper == score.dice
    assert score.nsd == score.hd95 == ()


def test_dice_of_a_volume_is_not_the_mean_of_its_slices() -> None:
    prediction = torch.stack([row(1, 1, 1, 1)[0], row(1, 0, 0, 0)[0]])
    label = torch.stack([row(1, 1, 1, 1)[0], row(0, 1, 0, 0)[0]])
    assert score_case("c", prediction, label, 1, MM).dice == (pytest.approx(8 / 10),)


def test_both_empty_is_left_out_and_one_empty_is_nothing() -> None:
    neither = score_case("c", row(0, 0), row(0, 0), 1, MM)
    assert neither.dice == (None,)
    assert neither.dice_paper == (1.0,)
    for prediction, label in ((row(1, 0), row(0, 0)), (row(0, 0), row(1, 0))):
        one = score_case("c", prediction, label, 1, MM)
        assert one.dice == one.dice_paper == (0.0,)


def test_surface_figures_are_in_millimetres() -> None:
    # Two plates of one voxel's thickness, two slices apart; a slice is 2.5 mm thick.
    prediction, label = torch.zeros(2, 9, 8, 8, dtype=torch.uint8)
    prediction[3, 2:6, 2:6] = 1
    label[5, 2:6, 2:6] = 1
    spacing = (2.5, 1.0, 1.0)
    tight = score_case("c", prediction, label, 1, spacing, tolerance=4.9)
    assert tight.hd95 == (pytest.approx(5.0),)
    assert tight.nsd == (0.0,)
    assert score_case("c", prediction, label, 1, spacing, tolerance=5.0).nsd == (1.0,)


def test_surface_figures_of_a_class_that_fills_the_volume() -> None:
    full = torch.ones(3, 4, 4, dtype=torch.uint8)
    score = score_case("c", full, full.clone(), 1, MM, tolerance=1.0)
    assert score.dice == (1.0,)
    assert score.nsd == (1.0,)
    assert score.hd95 == (0.0,)


def test_surface_figures_of_empty_masks() -> None:
    neither = score_case("c", row(0, 0), row(0, 0), 1, MM, tolerance=1.0)
    assert (neither.nsd, neither.hd95) == ((None,), (None,))
    one = score_case("c", row(1, 0), row(0, 0), 1, MM, tolerance=1.0)
    assert (one.nsd, one.hd95) == ((0.0,), (None,))


def test_flambys_dice_takes_all_foreground_first_and_nothing_for_both_empty() -> None:
    # Any foreground: 4 shared, 4 + 5 voxels. Class 2: 1 shared, 1 + 3.
    score = score_case("c", row(1, 1, 1, 2, 0), row(1, 1, 2, 2, 2), 2, MM, tolerance=1.0)
    assert score.dice_flamby == (pytest.approx(8 / 9.00001), pytest.approx(2 / 4.00001))
    empty = score_case("c", row(0, 0), row(0, 0), 2, MM, tolerance=1.0)
    assert empty.dice_flamby == (0.0, 0.0)
    assert score_case("c", row(1, 0), row(1, 0), 2, MM).dice_flamby == ()


@pytest.fixture
def site_score() -> SiteScore:
    cases = (
        CaseScore("one", (0.8, None), (0.8, 1.0)),
        CaseScore("two", (0.6, 0.2), (0.6, 0.2)),
        CaseScore("three", (0.4, None), (0.4, 1.0)),
    )
    return SiteScore("A", "test", ("kidney", "tumour"), cases, seconds=1.5)


def test_a_site_is_the_mean_over_cases_then_classes(site_score: SiteScore) -> None:
    assert site_score.by_class() == {"kidney": pytest.approx(0.6), "tumour": pytest.approx(0.2)}
    assert site_score.dice == pytest.approx(0.4)
    assert site_score.left_out == {"kidney": 0, "tumour": 2}
    assert site_score.dice_paper == pytest.approx((0.6 + 2.2 / 3) / 2)


def test_scores_survive_json(site_score: SiteScore) -> None:
    text = json.dumps(site_score.to_dict(), allow_nan=False)
    assert SiteScore.from_dict(json.loads(text)) == site_score
    assert json.loads(text)["dice"] == {
        "kidney": pytest.approx(0.6),
        "tumour": pytest.approx(0.2),
        "mean": pytest.approx(0.4),
    }


def test_no_figure_at_all_is_none_and_not_a_number() -> None:
    score = SiteScore("A", "validation", ("kidney",), ())
    assert score.dice is None
    assert json.loads(json.dumps(score.to_dict(), allow_nan=False))["dice"]["kidney"] is None


def test_surface_figures_appear_in_the_summary_when_they_exist() -> None:
    case = CaseScore("one", (0.5,), (0.5,), nsd=(0.75,), hd95=(None,), dice_flamby=(0.25,))
    score = SiteScore("A", "test", ("kidney",), (case,))
    values = score.to_dict()
    assert SiteScore.from_dict(json.loads(json.dumps(values))) == score
    assert values["dice_flamby"] == {"kidney": 0.25, "mean": 0.25}
    assert values["nsd"] == {"kidney": 0.75, "mean": 0.75}
    assert values["hd95"] == {"kidney": None, "mean": None}
