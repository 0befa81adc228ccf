"""The handlers and the inferer on MONAI's own engines with a network of one layer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler
from torch.optim.lr_scheduler import LambdaLR

from flap_nvflare.sam.runtime import Runtime
from flap_nvflare.training.errors import Stopped, TrainingError
from flap_nvflare.training.handlers import RateStart, RoundWatch
from flap_nvflare.training.inferer import AutocastInferer
from flap_nvflare.training.ranks import Ranks
from flap_nvflare.training.schedule import RoundClock
from flap_nvflare.training.volume_scorer import VolumeScorer, native_masks


class Bench:
    """A trainer with the handlers of the bundle's config."""

    def __init__(self, loss: Callable[..., torch.Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.network = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1.0)
        self.clock = RoundClock(rounds=2, warmup_fraction=0.0, decay_power=1.0, steps=4)
        self.scheduler = LambdaLR(self.optimizer, self.clock.factor)
        self.watch = RoundWatch(self.clock, "A")
        self.loss = loss or torch.nn.functional.mse_loss
        self.told: list[dict[str, Any]] = []
        self.clock.progress = self.told.append

    def run(self) -> None:
        batch = {"image": torch.ones(3, 2), "label": torch.ones(3, 1)}
        SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=[batch, batch],
            network=self.network,
            optimizer=self.optimizer,
            loss_function=self.loss,
            decollate=False,
            train_handlers=[
                RateStart(self.scheduler),
                self.watch,
                LrScheduleHandler(self.scheduler, epoch_level=False, print_lr=False),
            ],
        ).run()
        self.watch.require_whole()


def test_every_step_is_told_with_the_rate_it_used() -> None:
    bench = Bench()
    for bench.clock.index in (0, 1):
        bench.run()
    assert [(told["round"], told["step"], told["steps"]) for told in bench.told] == [
        (index, step, 4) for index in (0, 1) for step in (1, 2, 3, 4)
    ]
    # Two rounds of four steps: the rate falls from 1 to 0 in eight equal stretches.
    assert [told["rate"] for told in bench.told] == pytest.approx(
        [(15 - 2 * step) / 16 for step in range(8)]
    )
    assert [told["loss"] for told in bench.told[4:]] == bench.watch.losses


def test_stopping_ends_the_round_before_the_next_step(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.clock.should_stop = lambda: len(bench.told) == 3
    with caplog.at_level(logging.ERROR), pytest.raises(Stopped, match=r"after step 3 of 4"):
        bench.run()
    assert not caplog.records
    bench.clock.should_stop = lambda: False
    bench.told.clear()
    bench.run()
    assert len(bench.told) == 4


class TwoRanks(Ranks):
    """This process and another, whose part of every sum is known."""

    def total(self, value: float) -> float:
        self.parts.append(value)
        return value + self.other

    parts: ClassVar[list[float]]
    other: ClassVar[float]


def test_a_process_weighs_its_loss_and_tells_of_the_whole_batch() -> None:
    alone, bench = Bench(), Bench()
    TwoRanks.parts, TwoRanks.other = [], 0.0
    bench.watch.ranks = TwoRanks(rank=0, count=2)
    bench.clock.shares = (0.25, 1.0)
    gradients: dict[str, list[torch.Tensor]] = {"alone": [], "bench": []}
    for name, one in (("alone", alone), ("bench", bench)):
        one.network.weight.register_hook(gradients[name].append)
        one.clock.should_stop = lambda one=one: len(one.told) == 2
        with contextlib.suppress(Stopped):
            one.run()
    first = alone.watch.losses[0]
    # Asked whether to stop, then the loss by its share: a quarter of the rows of the first batch.
    assert TwoRanks.parts[:2] == [0.0, pytest.approx(first / 4)]
    assert bench.watch.losses[0] == pytest.approx(first / 4)
    # Half of it remains of two halves that the mean over two processes makes of it.
    assert torch.allclose(gradients["bench"][0], gradients["alone"][0] * 0.25 * 2)


def test_a_process_stops_with_another_and_refuses_its_loss() -> None:
    bench = Bench()
    TwoRanks.parts, TwoRanks.other = [], 1.0
    bench.watch.ranks = TwoRanks(rank=0, count=2)
    with pytest.raises(Stopped, match="after step 0 of 4"):
        bench.run()
    TwoRanks.other = float("nan")
    with pytest.raises(TrainingError, match="step 1 of 4: the loss is nan"):
        bench.run()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_reaches_no_weight(bad: float) -> None:
    bench = Bench()
    before: list[torch.Tensor] = []

    def loss(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if len(bench.told) == 2:
            before.append(bench.network.weight.detach().clone())
            return (prediction**2).sum() * bad
        return torch.nn.functional.mse_loss(prediction, label)

    bench.loss = loss
    with pytest.raises(TrainingError, match=f"site A, round 0, step 3 of 4: the loss is {bad}"):
        bench.run()
    assert torch.equal(bench.network.weight, before[0])
    bench.loss = torch.nn.functional.mse_loss
    bench.run()


def test_precision_changes_the_products_and_not_the_type() -> None:
    network = torch.nn.Linear(64, 4)
    image = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    exact = AutocastInferer(Runtime(cpu))(image, network)
    rough = AutocastInferer(Runtime(cpu, bf16=True))(image, network)
    assert torch.equal(exact, network(image))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.05)


@dataclass
class FakeVolume:
    name: str
    label: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.label.shape

    def native_label(self) -> torch.Tensor:
        return torch.as_tensor(self.label)


def test_volumes_of_any_length_are_put_together_again() -> None:
    draw = np.random.default_rng(0)
    volumes = [
        FakeVolume(name, draw.integers(0, 3, (length, 6, 6)).astype(np.uint8))
        for name, length in (("one", 5), ("two", 2), ("three", 1))
    ]
    seen: list[int] = []

    def perfect(image: torch.Tensor) -> torch.Tensor:
        seen.append(len(image))
        return torch.nn.functional.one_hot(image[:, 0].long(), 3).movedim(-1, 1).float()

    network = torch.nn.Module()
    network.forward = perfect  # type: ignore[method-assign]
    batches = [
        {"image": torch.as_tensor(volume.label[first : first + 2])[:, None], "volume": volume}
        for volume in volumes
        for first in range(0, len(volume.label), 2)
    ]
    scorer = VolumeScorer(2, lambda: False)
    SupervisedEvaluator(
        torch.device("cpu"), batches, network, val_handlers=[scorer], decollate=False
    ).run()
    assert [(score.case, score.dice) for score in scorer.scores] == [
        (volume.name, (1.0, 1.0)) for volume in volumes
    ]
    assert sum(seen) == 8


def test_masks_come_from_resized_logits() -> None:
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1, 0] = torch.tensor([3.0, -1.0])
    # Bilinear between pixel centres: 3, 2, 0, -1 of class 1 against 0 of class 0 (ties go down).
    assert native_masks(logits, (1, 4)).tolist() == [[[1, 1, 0, 0]]]
    assert native_masks(logits, (1, 2)).dtype == torch.uint8
