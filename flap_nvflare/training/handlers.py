"""What happens at each step of MONAI's trainer besides the step itself."""

from __future__ import annotations

import math

from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch.optim.lr_scheduler import LambdaLR

from flap_nvflare.training.errors import Stopped, TrainingError
from flap_nvflare.training.ranks import ONE_PROCESS, Ranks
from flap_nvflare.training.schedule import RoundClock


class RateStart:
    """Sets the rate of the round's first step; MONAI's LrScheduleHandler sets the others.

    The scheduler lives as long as the optimiser and would count on from the last round,
    while the schedule counts the steps of a round from 0.

    Args:
        scheduler: the scheduler whose factor is `RoundClock.factor`.
    """

    def __init__(self, scheduler: LambdaLR) -> None:
        self.scheduler = scheduler

    def attach(self, engine: Engine) -> None:
        """Registers the handler with a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Rewinds the scheduler to step 0 of the clock's round."""
        scheduler = self.scheduler
        scheduler.last_epoch = 0
        rates = zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
        scheduler._last_lr = [base * factor(0) for factor, base in rates]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate


class RoundWatch:
    """Ends the round when asked, refuses a loss that is no number, tells of every step.

    Several processes that train together decide together, before any of them waits for the
    others' gradients: all end at the same step if one of them is asked to, and all see the loss
    of the whole batch, the mean of theirs weighed by their rows. Each scales its own loss so
    that the mean of the gradients, which is all that DistributedDataParallel takes, is weighed
    in the same way.

    Args:
        clock: where the site is in the federation, and who asks and listens.
        site: the site's name, for messages.
        ranks: the processes that train together.

    Attributes:
        losses: the loss of every step of the round.
        stopped: whether the round was ended as asked.
    """

    def __init__(self, clock: RoundClock, site: str, ranks: Ranks = ONE_PROCESS) -> None:
        self.clock = clock
        self.site = site
        self.ranks = ranks
        self.losses: list[float] = []
        self.stopped = False

    def attach(self, engine: Engine) -> None:
        """Registers the handlers with a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._ask)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._check)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._tell)

    def _start(self, engine: Engine) -> None:
        self.losses, self.stopped = [], False

    def _ask(self, engine: Engine) -> None:
        # Terminated and not raised: ignite logs every exception as an error.
        if self.ranks.any(self.clock.should_stop()):
            self.stopped = True
            engine.terminate()

    def require_whole(self) -> None:
        """Raises Stopped if the round was ended before its last step."""
        if self.stopped:
            raise Stopped(
                f"site {self.site}, round {self.clock.index}: stopped as asked after step "
                f"{len(self.losses)} of {self.clock.steps}"
            )

    def _check(self, engine: Engine) -> None:
        # Before the backward pass, so that neither weights nor moments take it in.
        own = engine.state.output[CommonKeys.LOSS]
        share = self.clock.shares[(engine.state.iteration - 1) % len(self.clock.shares)]
        loss = self.ranks.total(float(own.detach()) * share)
        if not math.isfinite(loss):
            raise TrainingError(
                f"site {self.site}, round {self.clock.index}, step {engine.state.iteration} of "
                f"{self.clock.steps}: the loss is {loss}; nothing of this round is kept. Lower "
                f"learning_rate, use precision fp32, or look for broken scans"
            )
        self.losses.append(loss)
        if self.ranks.count > 1:
            engine.state.output[CommonKeys.LOSS] = own * (share * self.ranks.count)

    def _tell(self, engine: Engine) -> None:
        if self.clock.progress is None:
            return
        # Attached before the schedule's handler: the rate shown is the one this step used.
        self.clock.progress(
            {
                "round": self.clock.index,
                "step": engine.state.iteration,
                "steps": self.clock.steps,
                "loss": self.losses[-1],
                "rate": engine.optimizer.param_groups[0]["lr"],
            }
        )
