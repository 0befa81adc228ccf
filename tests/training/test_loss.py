"""The loss with weights: MONAI's own without, by hand with, and unbiased over draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss

from flap_nvflare.data.draws import ForegroundSampler
from flap_nvflare.training.loss import SliceLoss, prepare_batch


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, 3, 4, 4) and labels (n, 1, 4, 4)."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, 3, 4, 4, generator=draw)
    return logits, torch.randint(0, 3, (size, 1, 4, 4), generator=draw, dtype=torch.uint8)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5), seed=st.integers(0, 1000), dice_weight=st.floats(0, 1))
def test_weights_of_one_give_monais_loss(size: int, seed: int, dice_weight: float) -> None:
    logits, label = batch(size, seed)
    logits.requires_grad_()
    monai = DiceCELoss(
        include_background=True,
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=True,
        lambda_dice=dice_weight,
        lambda_ce=1 - dice_weight,
    )
    loss = SliceLoss(dice_weight)
    expected = monai(logits, label)
    assert torch.equal(loss(logits, label), expected)
    weighted = loss(logits, (label, torch.ones(size)))
    assert float(weighted.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    (own,) = torch.autograd.grad(weighted, logits)
    (theirs,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(own, theirs, atol=1e-6)


@pytest.mark.parametrize("dice_weight", [0.0, 0.8, 1.0])
def test_two_slices_of_one_pixel_by_hand(dice_weight: float) -> None:
    # The softmax gives (background, class) = (3/4, 1/4) and (1/2, 1/2); labels 0 and 1.
    background = torch.tensor([3 / 4, 1 / 2])
    logits = torch.stack([background, 1 - background], dim=1).log().reshape(2, 2, 1, 1)
    label = torch.tensor([0, 1], dtype=torch.uint8).reshape(2, 1, 1, 1)
    loss = SliceLoss(dice_weight)(logits, (label, torch.tensor([4.0, 0.5])))
    dice = [
        2 * (4 * 3 / 4) / (4 * 9 / 16 + 0.5 / 4 + 4),  # background: y = (1, 0)
        2 * (0.5 / 2) / (4 / 16 + 0.5 / 4 + 0.5),  # the class: y = (0, 1)
    ]
    entropy = -(4 * math.log(3 / 4) + 0.5 * math.log(1 / 2)) / 2
    expected = dice_weight * (1 - sum(dice) / 2) + (1 - dice_weight) * entropy
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_a_weight_of_two_is_a_slice_twice() -> None:
    """For Dice alone: its sums over the batch do not depend on the number of slices."""
    logits, label = batch(2)
    twice = torch.tensor([0, 1, 1])
    loss = SliceLoss(1.0)
    weighted = loss(logits, (label, torch.tensor([1.0, 2.0])))
    assert float(weighted) == pytest.approx(float(loss(logits[twice], label[twice])), abs=1e-6)


def test_the_expectation_over_draws_is_the_uniform_loss() -> None:
    """Ten slices, two with foreground in half of the draws; the same as all ten at once.

    Dice is a ratio of sums over the batch, so what must agree are the sums: a batch of all
    draws of many epochs against a batch of all slices.
    """
    logits, label = batch(10)
    label[2:] = 0
    shows = [bool(value.any()) for value in label]
    sampler = ForegroundSampler(shows, 0.5, 0, weighted=True)
    draws = [draw for _ in range(3000) for draw in sampler]
    order = torch.tensor([int(draw) for draw in draws])
    weights = torch.tensor([draw.weight for draw in draws])
    for dice_weight in (0.0, 1.0):
        loss = SliceLoss(dice_weight)
        uniform = float(loss(logits, label))
        drawn = float(loss(logits[order], (label[order], weights)))
        biased = float(loss(logits[order], label[order]))
        assert drawn == pytest.approx(uniform, abs=0.005)
        assert abs(biased - uniform) > 0.02


def test_a_batch_brings_its_weights_along() -> None:
    image, label = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    assert prepare_batch({"image": image, "label": label}, "cpu") == (image, label)
    weight = torch.tensor([1.0, 2.0])
    target = prepare_batch({"image": image, "label": label, "weight": weight}, "cpu")[1]
    assert torch.equal(target[0], label)
    assert torch.equal(target[1], weight)
