"""Dice against seconds of training, on workflows that only keep time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flap_nvflare import in_process
from flap_nvflare.in_process import Curve, Outcome
from flap_nvflare.settings import Federation

FEDERATION = Federation(class_names=("kidney",))


class Flow:
    """A site whose validation takes 100 seconds and gives what the adapter says."""

    def __init__(self, clock: list[float], has_cases: bool = True) -> None:
        self.clock = clock
        self.has_cases = has_cases
        self.dice = 0.0

    def load_adapter(self, tensors: dict[str, torch.Tensor]) -> None:
        self.dice = float(tensors["dice"])

    def evaluate(self, split: str) -> Flow:
        assert split == "validation"
        self.clock[0] += 100
        return self

    def to_dict(self) -> dict[str, Any]:
        dice = self.dice if self.has_cases else None
        return {"dice": {"kidney": dice, "mean": dice}}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [5.0]
    monkeypatch.setattr(in_process.time, "perf_counter", lambda: now[0])
    return now


def adapter(dice: float) -> dict[str, torch.Tensor]:
    return {"dice": torch.tensor(dice, dtype=torch.float64)}


def test_evaluation_takes_no_time(clock: list[float]) -> None:
    curve = Curve({"A": Flow(clock), "B": Flow(clock), "C": Flow(clock, has_cases=False)})
    clock[0] += 7  # before the training
    curve.start()
    for index, (seconds, dice) in enumerate([(3, 0.25), (4, 0.5)]):
        clock[0] += seconds
        curve.mark(index, adapter(dice), ("A", "B", "C"))
    assert curve.history(FEDERATION) == [
        {"round": 0, "seconds": 3.0, "dice": {"kidney": 0.25, "mean": 0.25}},
        {"round": 1, "seconds": 7.0, "dice": {"kidney": 0.5, "mean": 0.5}},
    ]


def test_sites_alone_share_a_round(clock: list[float]) -> None:
    """Each site trains through all rounds by itself; a round's time is that of all sites."""
    curve = Curve({"A": Flow(clock), "B": Flow(clock)})
    for name, best in (("A", 0.4), ("B", 0.8)):
        curve.start()
        for index in (0, 1):
            clock[0] += 2 + index
            curve.mark(index, adapter(best / (2 - index)), (name,))
    history = curve.history(FEDERATION)
    assert [(point["seconds"], point["dice"]["mean"]) for point in history] == [(4, 0.3), (10, 0.6)]


def test_without_any_figure_the_mean_is_none() -> None:
    scores = {"A": {"dice": {"kidney": None, "mean": None}}}
    outcome = Outcome("federated", FEDERATION, {"federation": adapter(0)}, scores, 1.0)
    assert outcome.mean_dice() is None
    assert outcome.to_dict()["mean"] == {"kidney": None, "mean": None}
    assert "history" not in outcome.to_dict()
