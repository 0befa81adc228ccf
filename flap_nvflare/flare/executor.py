"""The executor: a site's work, asked for by task, done by the site's own MONAI workflow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from flap_nvflare.adapter.guard import check_update
from flap_nvflare.adapter.update import UpdateSpec, load_update, save_update
from flap_nvflare.flare import messages
from flap_nvflare.flare.context import read_site
from flap_nvflare.settings import Federation, Site

if TYPE_CHECKING:
    from flap_nvflare.training.work import SiteWork, TrainReport

_KEPT_ROUNDS = 2


class RefusedMessageError(ValueError):
    """The server's message is not what this site accepts."""


class FlapExecutor(Executor):
    """Tasks `train`, `validate` and `submit_model` on the bundle installed at this site.

    A task carries settings and tensors, never code. What must outlive this process (the
    optimiser's moments) is on the site's disk, since FLARE's simulator may start a process
    for every task.
    """

    def __init__(self) -> None:
        super().__init__()
        self._workflow: SiteWork | None = None

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
            what = f"{type(error).__name__}: {error}"
            self.log_warning(fl_ctx, f"task {task_name} failed: {what}", fire_event=False)
            self.log_error(fl_ctx, f"task {task_name} failed with {type(error).__name__}")
            code = (
                ReturnCode.BAD_TASK_DATA
                if isinstance(error, RefusedMessageError)
                else ReturnCode.EXECUTION_EXCEPTION
            )
            return make_reply(code)

    def _train(
        self, shareable: Shareable, fl_ctx: FLContext, should_stop: Callable[[], bool]
    ) -> Shareable:
        clock = Stopwatch()
        dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
        round_index = int(dxo.meta[messages.ROUND])
        workflow = self._open(shareable, fl_ctx)
        self._load(workflow, dxo)
        clock.lap("open")
        score: dict[str, Any] = {}
        if round_index > 0 and workflow.cases.validation:
            score = workflow.evaluate("validation", should_stop).to_dict()
        clock.lap("evaluate")
        state = _state_folder(workflow.site, shareable)
        moments = state / f"moments_{round_index - 1}.safetensors"
        if moments.is_file():
            workflow.load_state(
                moments, reset_factors=bool(shareable.get_header(messages.TURNED, True))
            )
        else:  # the first round, or this site missed the last one
            workflow.reset_state()
        progress = self._progress(workflow, fl_ctx)
        report = _train_round(workflow, round_index, state, should_stop, progress)
        clock.lap("read", beside=("steps", report.seconds))
        tensors, spec = workflow.adapter(), workflow.spec()
        workflow.save_state(state / f"moments_{round_index}.safetensors")
        save_update(state / "adapter.safetensors", tensors, spec)
        (state / f"moments_{round_index - _KEPT_ROUNDS}.safetensors").unlink(missing_ok=True)
        clock.lap("save")
        figures = {
            "dice": score.get("dice", {}),
            "loss": report.loss,
            "steps": report.steps,
            "slices": report.slices,
            "cases": report.cases,
            "seconds": round(sum(clock.seconds.values()), 3),
            "timings": {name: round(seconds, 3) for name, seconds in clock.seconds.items()},
            "synthetic": workflow.site.synthetic,
        }
        weight = _weight(workflow.federation, report.cases, report.slices)
        return messages.weights_dxo(
            tensors,
            spec,
            round_index,
            **{messages.WEIGHT: weight, messages.REPORT: figures},
        ).to_shareable()

    def _validate(
        self, shareable: Shareable, fl_ctx: FLContext, should_stop: Callable[[], bool]
    ) -> Shareable:
        dxo = messages.read_dxo(shareable, DataKind.COLLECTION)
        workflow = self._open(shareable, fl_ctx)
        scores: dict[str, Any] = {}
        for name in sorted(dxo.data):
            self._load(workflow, dxo.data[name])
            held_out = name == "last" and workflow.cases.validation
            scores[name] = {
                split: workflow.evaluate(split, should_stop).numbered().to_dict()
                for split in (("test", "validation") if held_out else ("test",))
            }
        return DXO(DataKind.METRICS, data=scores).to_shareable()

    def _submit_model(
        self, shareable: Shareable, fl_ctx: FLContext, should_stop: Callable[[], bool]
    ) -> Shareable:
        workflow = self._open(shareable, fl_ctx)
        tensors, spec, _ = load_update(
            _state_folder(workflow.site, shareable) / "adapter.safetensors"
        )
        return messages.weights_dxo(tensors, spec, workflow.federation.rounds).to_shareable()

    def _open(self, shareable: Shareable, fl_ctx: FLContext) -> SiteWork:
        """This site's workflow for the task's settings, kept while they stay the same."""
        from flap_nvflare.bundle.workflow import build_work

        federation = Federation.from_dict(shareable.get_header(messages.FEDERATION) or {})
        if self._workflow is None or self._workflow.federation != federation:
            site = read_site(fl_ctx)
            if site.synthetic:
                self.log_info(
                    fl_ctx, f"site {site.name} works on SYNTHETIC scans: no data were named"
                )
            self._workflow = build_work(federation, site)
        return self._workflow

    def _load(self, workflow: SiteWork, dxo: DXO) -> None:
        """Checks the server's adapter against this site's own network, then loads it."""
        sent_round = dxo.meta.get(messages.ROUND)
        refusal = check_update(
            dxo.data,
            UpdateSpec.from_dict(dxo.meta[messages.SPEC]),
            site="server",
            round_index=sent_round,
            expected_round=sent_round,
            weighted=False,
            expected=workflow.spec(),
            frozen=set(workflow.network.state_dict()) - set(workflow.spec().shapes),
        )
        if refusal is not None:
            raise RefusedMessageError(f"adapter from the server: {refusal.key}: {refusal.reason}")
        workflow.load_adapter({name: tensor.to(torch.float32) for name, tensor in dxo.data.items()})

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


def _train_round(
    workflow: SiteWork,
    round_index: int,
    state: Path,
    should_stop: Callable[[], bool],
    progress: Callable[[dict[str, Any]], None],
) -> TrainReport:
    """The round in this process, or in as many as the site says."""
    if workflow.site.processes == 1:
        return workflow.train(round_index, should_stop, progress)
    from flap_nvflare.flare.processes import train_in_processes

    return train_in_processes(workflow, round_index, state, should_stop, progress)


def _state_folder(site: Site, shareable: Shareable) -> Path:
    run = str(shareable.get_header(messages.RUN) or "")
    parts = run.split("/")
    if len(parts) != 2 or not all(part and set(part) <= _SAFE for part in parts):
        raise RefusedMessageError(f"run name {run!r} is not of the form job/time")
    if site.state_dir is None:
        raise ValueError(f"site {site.name} has no state_dir")
    folder = site.state_dir / parts[0] / parts[1] / site.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def _weight(federation: Federation, cases: int, slices: int) -> float:
    return float({"cases": cases, "slices": slices, "equal": 1}[federation.weight_by])
