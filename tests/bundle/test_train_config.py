"""What the training config builds: the loss by hand, and methods through a file and on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from flap_nvflare.bundle.workflow import TRAIN_CONFIG, build_work
from flap_nvflare.settings import Federation, Site


def configured_loss(federation: Federation, site: Site) -> torch.nn.Module:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(TRAIN_CONFIG))
    parser["federation"] = federation
    parser["hospital"] = site
    loss: torch.nn.Module = parser.get_parsed_content("loss")
    return loss


@pytest.mark.parametrize("weight", [0.0, 0.8, 1.0])
def test_loss_by_hand(federation: Federation, site: Site, weight: float) -> None:
    loss = configured_loss(dataclasses.replace(federation, dice_weight=weight), site)
    # Two pixels; the softmax gives (background, class) = (3/4, 1/4) and (1/2, 1/2).
    background = torch.tensor([3 / 4, 1 / 2])
    logits = torch.stack([background, 1 - background]).log().reshape(1, 2, 1, 2)
    label = torch.tensor([0, 1], dtype=torch.uint8).reshape(1, 1, 1, 2)
    # Squared probabilities in the denominator: 2 * (p . y) / (p . p + y . y) for each class.
    dice = [
        2 * (3 / 4) / (9 / 16 + 1 / 4 + 1),  # background: y = (1, 0)
        2 * (1 / 2) / (1 / 16 + 1 / 4 + 1),  # the class: y = (0, 1)
    ]
    cross_entropy = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    expected = weight * (1 - sum(dice) / 2) + (1 - weight) * cross_entropy
    assert float(loss(logits, label)) == pytest.approx(expected, abs=1e-4)


# `full` has weights that no gradient reaches, `lora` nothing but factors.
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_method_goes_on_from_files_to_the_same_bytes(
    federation: Federation, site: Site, tmp_path: Path, method: str
) -> None:
    settings = dataclasses.replace(federation, method=method)
    whole = build_work(settings, site)
    fresh = whole.adapter()
    whole.train(0)
    sent = whole.adapter()
    assert any(not torch.equal(sent[name], fresh[name]) for name in sent)
    whole.save_state(tmp_path / "moments.safetensors")
    whole.train(1)
    later = build_work(settings, site)
    later.load_adapter(sent)
    later.load_state(tmp_path / "moments.safetensors", reset_factors=False)
    later.train(1)
    for name, tensor in whole.adapter().items():
        assert torch.equal(tensor, later.adapter()[name]), name
