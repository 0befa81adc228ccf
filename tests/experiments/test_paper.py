"""The paper's numbers: what is printed follows from the network's shapes."""

from __future__ import annotations

import dataclasses

import pytest

from flap_nvflare.experiments.paper import PAPER, PaperRow
from flap_nvflare.settings import METHODS

_ROUNDS, _BITS, _GIBI = 25, 32, 2**30
# Of ViT-B at 224 pixels, two classes, rank 32; the tests of `sam` hold the network to them.
_PARAMETERS = {
    "full": 90_532_927,
    "attention": 31_681_152,
    "decoder": 3_902_195,
    "partial_decoder": 478_320,
    "lora": 1_368_064,
    "lora_decoder": 5_270_259,
    "flap": 1_846_384,
}


def test_printed_gibibits_and_reductions_follow_from_the_parameters() -> None:
    assert tuple(row.method for row in PAPER) == METHODS
    for row in PAPER:
        number = _PARAMETERS[row.method]
        # Two decimals are printed; 0.356 of the partial decoder as 0.36.
        assert row.printed_gb == pytest.approx(number * _ROUNDS * _BITS / _GIBI, abs=0.0051)
        # The paper divides what it has rounded: 67.45 / 0.36.
        assert row.reduction == pytest.approx(67.45 / row.printed_gb, abs=0.06)


def test_what_was_read_with_doubt_is_no_figure() -> None:
    by_method = {row.method: row for row in PAPER}
    assert by_method["attention"].gain == 8.86
    assert by_method["attention"].sure_gain is None
    assert by_method["lora"].sure_gain is None
    assert by_method["full"].sure_dice is None
    assert (by_method["flap"].sure_dice, by_method["flap"].sure_gain) == (60.5, 9.77)


def test_rows_are_checked_and_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match="'svd' is not known"):
        PaperRow("svd", 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="'dice' has no value"):
        PaperRow("full", None, None, 1.0, 1.0, unsure=("dice",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER[0].dice = 55.0  # type: ignore[misc]
