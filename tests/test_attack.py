"""What hostile sites send in experiments."""

from __future__ import annotations

import pytest
import torch

from flap_nvflare.attack import attacked

START = {"head": torch.tensor([1.0, 2.0]), "other": torch.zeros(3)}
UPDATE = {"head": torch.tensor([1.5, 2.0])}


def test_by_hand() -> None:
    assert attacked("scale", UPDATE, START, 0)["head"].tolist() == [51.0, 2.0]
    assert attacked("flip", UPDATE, START, 0)["head"].tolist() == [0.5, 2.0]
    noise = attacked("random", UPDATE, START, 0)["head"] - START["head"]
    assert noise.norm().item() == pytest.approx(5.0)
    again = attacked("random", UPDATE, START, 0)["head"] - START["head"]
    assert torch.equal(noise, again)


def test_an_unknown_attack_is_refused() -> None:
    with pytest.raises(ValueError, match="'sleep' is not known"):
        attacked("sleep", UPDATE, START, 0)
