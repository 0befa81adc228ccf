"""Masks at native resolution: the largest resized logit, in however many parts."""

from __future__ import annotations

import pytest
import torch

from flap_nvflare.training import volume_scorer
from flap_nvflare.training.volume_scorer import native_masks


@pytest.mark.parametrize("at_once", [1, 2 * 3 * 20 * 24, 2**24])
def test_the_class_of_the_largest_resized_logit(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_scorer, "_LOGITS", at_once)
    logits = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    resized = torch.nn.functional.interpolate(
        logits, size=(20, 24), mode="bilinear", align_corners=False
    )
    masks = native_masks(logits, (20, 24))
    assert masks.dtype == torch.uint8
    assert masks.equal(resized.argmax(dim=1).to(torch.uint8))


def test_of_equal_logits_the_first_class_counts() -> None:
    logits = torch.zeros(1, 4, 2, 2)
    logits[0, 1, 0] = logits[0, 3, 0] = 1.0
    assert native_masks(logits, (2, 2)).tolist() == [[[1, 1], [0, 0]]]
