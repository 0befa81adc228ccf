"""The executor: a site's work, asked for by task, done by the site's own MONAI workflow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from flap_nvflare.adapter.factors import of_rank
from flap_nvflare.adapter.guard import check_update
from flap_nvflare.adapter.parcel import Parcel, parcel
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.combinations import check
from flap_nvflare.flare import messages
from flap_nvflare.flare.context import (
    RefusedMessageError,
    ranked_here,
    read_limits,
    read_site,
    simulated,
    state_folder,
)
from flap_nvflare.flare.error_log import keep_error_log_bare
from flap_nvflare.settings import Federation
from flap_nvflare.site.limits import Limits
from flap_nvflare.site.reasons import of_exception, sentence

if TYPE_CHECKING:
    from flap_nvflare.training.site_round import Progress, Run, SiteRound
    from flap_nvflare.training.work import SiteWork, TrainReport


class FlapExecutor(Executor):
    """Tasks `train`, `validate` and `submit_model` on the bundle installed at this site.

    A task carries settings and tensors, never code. What must outlive this process (the
    optimiser's moments) is on the site's disk, since FLARE's simulator may start a process
    for every task.
    """

    def __init__(self) -> None:
        super().__init__()
        keep_error_log_bare()
        self._site_round: SiteRound | None = None
        self._open_for: tuple[Federation, str, Limits | None] | None = None

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """The task's reply, or an error reply; details stay in this site's own log."""
        tasks = {
            messages.TRAIN: self._train,
            messages.VALIDATE: self._validate,
            messages.SUBMIT_MODEL: self._submit_model,
        }
        if task_name not in tasks:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        try:
            return tasks[task_name](shareable, fl_ctx, lambda: bool(abort_signal.triggered))
        except Exception as error:  # whatever happens here must not take the process down
            if abort_signal.triggered:
                return make_reply(ReturnCode.TASK_ABORTED)
            # The error's text may name a case: it goes to the site's own log, at a level that
            # FLARE does not upload.
            what, reason = f"{type(error).__name__}: {error}", of_exception(error)
            self.log_warning(fl_ctx, f"task {task_name} failed: {what}", fire_event=False)
            said = sentence(fl_ctx.get_identity_name(), reason.to_dict())
            self.log_error(fl_ctx, f"task {task_name} failed with {type(error).__name__}: {said}")
            code = (
                ReturnCode.BAD_TASK_DATA
                if isinstance(error, RefusedMessageError)
                else ReturnCode.EXECUTION_EXCEPTION
            )
            return messages.error_reply(code, reason)

    def _train(
        self, shareable: Shareable, fl_ctx: FLContext, should_stop: Callable[[], bool]
    ) -> Shareable:
        clock = Stopwatch()
        dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
        round_index = int(dxo.meta[messages.ROUND])
        site_round = self._open(shareable, fl_ctx)
        work = site_round.work
        if not 0 <= round_index < work.federation.rounds:
            raise RefusedMessageError(f"round {round_index} is none of {work.federation.rounds}")
        self._receive(site_round, dxo, shareable)
        clock.lap("open")
        score: dict[str, Any] = {}
        if round_index > 0 and work.cases.validation:
            score = site_round.evaluate("validation", should_stop).to_dict()
        clock.lap("evaluate")
        report = site_round.train(
            round_index, should_stop, self._progress(work, fl_ctx), _run(site_round, fl_ctx)
        )
        clock.lap("read", beside=("steps", report.seconds))
        data = Parcel(site_round.update(), {}, site_round.control_change()).flat()
        site_round.save(round_index)
        clock.lap("save")
        figures = {
            "dice": score.get("dice", {}),
            "loss": report.loss,
            "steps": report.steps,
            "slices": report.slices,
            "cases": report.cases,
            "seconds": round(sum(clock.seconds.values()), 3),
            "timings": {name: round(seconds, 3) for name, seconds in clock.seconds.items()},
            "synthetic": work.site.synthetic,
        }
        weight = work.federation.weight_of(report.cases, report.slices)
        reply = messages.weights_dxo(
            data,
            work.spec(round_index),
            round_index,
            **{messages.WEIGHT: weight, messages.REPORT: figures},
        ).to_shareable()
        messages.hand_on(shareable, reply)
        return reply

    def _validate(
        self, shareable: Shareable, fl_ctx: FLContext, should_stop: Callable[[], bool]
    ) -> Shareable:
        dxo = messages.read_dxo(shareable, DataKind.COLLECTION)
        site_round = self._open(shareable, fl_ctx)
        scores: dict[str, Any] = {}
        for name in sorted(dxo.data):
            self._receive(site_round, dxo.data[name], shareable)
            held_out = name == "last" and site_round.work.cases.validation
            scores[name] = {
                # Only the last adapter has a personal one beside it.
                split: site_round.evaluate(split, should_stop, personal=name == "last")
                .numbered()
                .to_dict()
                for split in (("test", "validation") if held_out else ("test",))
            }
        return DXO(DataKind.METRICS, data=scores).to_shareable()

    def _submit_model(
        self, shareable: Shareable, fl_ctx: FLContext, should_stop: Callable[[], bool]
    ) -> Shareable:
        site_round = self._open(shareable, fl_ctx)
        if site_round.work.federation.dp_clip:
            raise RefusedMessageError("dp_clip: the site's own adapter would leave without noise")
        tensors, spec = site_round.last_adapter()
        rounds = site_round.work.federation.rounds
        return messages.weights_dxo(tensors, spec, rounds).to_shareable()

    def _open(self, shareable: Shareable, fl_ctx: FLContext) -> SiteRound:
        """This site's work for the task's settings and run, kept while they stay the same."""
        from flap_nvflare.bundle.workflow import build_work
        from flap_nvflare.training.site_round import SiteRound

        federation = Federation.from_dict(shareable.get_header(messages.FEDERATION) or {})
        check(federation)
        run = str(shareable.get_header(messages.RUN) or "")
        limits = read_limits(fl_ctx)  # as the file says now: a job may take weeks
        if self._open_for != (federation, run, limits):
            if limits is not None:
                limits.check(federation)  # before anything is built
            site = read_site(fl_ctx)
            if site.synthetic:
                self.log_info(fl_ctx, f"site {site.name} works on SYNTHETIC scans")
            work = build_work(ranked_here(federation, site, fl_ctx), site)
            if limits is not None:
                limits.check_cases(len(work.cases.train))
                with_control = 2 if federation.optimizer == "scaffold" else 1
                limits.check_update(with_control * work.spec().bytes)
            self._site_round = SiteRound(work, state_folder(site, run))
            self._open_for = (federation, run, limits)
            self._check_fixed(self._site_round, shareable)
        assert self._site_round is not None
        return self._site_round

    def _check_fixed(self, site_round: SiteRound, shareable: Shareable) -> None:
        """Factors that never travel must have been drawn alike at the server and here."""
        wanted, ours = shareable.get_header(messages.FIXED), site_round.fixed_sha256()
        if wanted != ours:
            self._open_for = None
            raise RefusedMessageError(
                f"the frozen factors drawn here have SHA-256 {ours}, the server's {wanted}: use "
                f"the same version of torch"
            )

    def _receive(self, site_round: SiteRound, dxo: DXO, shareable: Shareable) -> None:
        """Checks the server's adapter against this site's own network, then takes it up."""
        self._check_fixed(site_round, shareable)
        sent_round, work = dxo.meta.get(messages.ROUND), site_round.work
        tensors, offset, control = parcel(dict(dxo.data))
        expected = work.spec_down()
        spec = UpdateSpec.from_dict(dxo.meta[messages.SPEC])
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        ranked = expected.part(expected.shapes, min(max(1, spec.rank), expected.rank))
        if sent_round == work.federation.rounds and shapes == ranked.shapes:  # another site's own
            tensors = of_rank(tensors, expected.rank)
            spec = spec.part(spec.shapes, expected.rank)
        refusal = check_update(
            tensors,
            spec,
            site="server",
            round_index=sent_round,
            expected_round=sent_round,
            weighted=False,
            expected=expected,
            frozen=set(work.network.state_dict()) - set(expected.shapes),
        )
        if refusal is not None:
            raise RefusedMessageError(f"adapter from the server: {refusal.key}: {refusal.reason}")
        site_round.receive(
            tensors,
            round_index=int(sent_round),
            turned=bool(shareable.get_header(messages.TURNED, True)),
            offset=offset,
            control=control,
        )

    def _progress(self, workflow: SiteWork, fl_ctx: FLContext) -> Callable[[dict[str, Any]], None]:
        def show(figures: dict[str, Any]) -> None:
            step, steps = figures["step"], figures["steps"]
            if step == steps or step % max(1, steps // 2) == 0:
                self.log_info(
                    fl_ctx,
                    f"site {workflow.site.name} round {figures['round'] + 1}/"
                    f"{workflow.federation.rounds} step {step}/{steps} "
                    f"loss {figures['loss']:.4f} rate {figures['rate']:.2e}",
                )

        return show


class Stopwatch:
    """Seconds of a task by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, beside: tuple[str, float] | None = None) -> None:
        """Books the time since the last lap, less what is booked `beside` it under another name."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        if beside is not None:
            self.seconds[beside[0]] = beside[1]
            self.seconds[name] -= beside[1]
        self._last = now


def _run(site_round: SiteRound, fl_ctx: FLContext) -> Run | None:
    """Trains the round in as many processes as the site says; None for this one alone."""
    site = site_round.work.site
    own = not simulated(fl_ctx) if site.own_process == "auto" else site.own_process == "on"
    if site.processes == 1 and not own:
        return None
    from flap_nvflare.flare.processes import train_in_processes

    def run(
        work: SiteWork, round_index: int, should_stop: Callable[[], bool], progress: Progress
    ) -> TrainReport:
        return train_in_processes(
            work, round_index, site_round.memory.folder, should_stop, progress
        )

    return run
