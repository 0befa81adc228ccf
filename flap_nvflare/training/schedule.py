"""The learning rate, counted over the whole federation and not over one site's steps.

Counted in steps, the warm-up of a small site would fill many of its rounds while a large
site leaves it in the first. Counted in rounds, every site has the same rate at the same
time, however many slices it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def rate_factor(progress: float, warmup_fraction: float, decay_power: float) -> float:
    """Factor of the base rate at `progress` (0 at the federation's start, 1 at its end).

    Rises linearly to 1 over `warmup_fraction`, then falls as (1 - t)^decay_power, where t
    is the share of what follows the warm-up.
    """
    if progress < warmup_fraction:
        return progress / warmup_fraction
    if warmup_fraction >= 1.0:
        return 1.0
    t = (progress - warmup_fraction) / (1.0 - warmup_fraction)
    return float(max(0.0, 1.0 - t) ** decay_power)


def never() -> bool:
    """Asked whether to stop: no."""
    return False


@dataclass
class RoundClock:
    """Where a site is in the federation; the schedule and the handlers read it.

    Attributes:
        rounds: rounds of the federation.
        warmup_fraction: share of the federation with a rising rate.
        decay_power: exponent of the fall after it.
        index: the present round, from 0.
        steps: optimiser steps of the present round at this site.
        shares: this process's share of the rows of each batch of an epoch; several processes
            train one site only by `training.ranks`.
        should_stop: asked before every step; true ends the work.
        progress: told of every step, if anyone listens.
    """

    rounds: int
    warmup_fraction: float
    decay_power: float
    index: int = 0
    steps: int = 1
    shares: Sequence[float] = (1.0,)
    should_stop: Callable[[], bool] = never
    progress: Callable[[dict[str, Any]], None] | None = None

    def factor(self, step: int) -> float:
        """Factor of the base rate for step `step` (from 0) of the present round.

        A step stands for the stretch of the round it covers and takes the rate at its
        middle: so neither the first step nor the last is lost at rate 0.
        """
        progress = (self.index + (step + 0.5) / self.steps) / self.rounds
        return rate_factor(min(progress, 1.0), self.warmup_fraction, self.decay_power)
