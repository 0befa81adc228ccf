"""The server's workflow: FLARE's ScatterAndGather with quorum, resume and a last evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.bcast_manager import _KEY_MIN_RESPS
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from flap_nvflare.adapter.guard import Refusal, printable
from flap_nvflare.adapter.update import content_sha256
from flap_nvflare.flare import messages
from flap_nvflare.flare.aggregator import QuorumError
from flap_nvflare.flare.context import job_name, workspace
from flap_nvflare.flare.finish import models_to_score, write_results
from flap_nvflare.flare.job import ServerJob, open_job
from flap_nvflare.flare.reports import read_scores
from flap_nvflare.flare.tracking import Tracking, start_tracking

RESULTS = "flap"  # folder in the job's own folder, which the administrator downloads


class FlapController(ScatterAndGather):
    """Runs the rounds that are left, then scores every model on every site's test cases.

    The settings come from the job's `federation.yaml`; `FLAP_RESUME` goes on with a run.

    A round ends when all its sites have answered, or `straggler_wait` after the quorum has, or
    when those that are missing are gone; it fails, with the sites' names and reasons, as soon as
    the quorum is out of reach, and at the latest after `train_timeout`.

    Args:
        federation: settings in place of `federation.yaml`, as `Federation.to_dict` gives them.
        run_name: name of the folder of this federation's runs; empty for the job's own name.
        resume: `auto` goes on with the last run at a provisioned server if it was broken off and
            has these settings; `last`, `new`, or a run's name. FLAP_RESUME comes before it.
        aggregator_id: component id of the aggregator.
        persistor_id: component id of the persistor.
        shareable_generator_id: component id of the shareable generator.
    """

    def __init__(
        self,
        federation: dict[str, Any] | None = None,
        run_name: str = "",
        resume: str = "auto",
        aggregator_id: str = "aggregator",
        persistor_id: str = "persistor",
        shareable_generator_id: str = "shareable_generator",
    ) -> None:
        super().__init__(
            aggregator_id=aggregator_id,
            persistor_id=persistor_id,
            shareable_generator_id=shareable_generator_id,
            task_check_period=0.1,
            ignore_result_error=True,  # what a bad answer means is decided here
        )
        self.federation = federation
        self.run_name = run_name
        self.resume = resume
        self._job: ServerJob | None = None
        self._tracking: Tracking | None = None
        self._bytes_down = 0
        self._models: tuple[str, ...] = ()
        self._scores: dict[str, dict[str, Any]] = {}

    @property
    def job(self) -> ServerJob:
        """The open job."""
        if self._job is None:
            raise RuntimeError("the job is opened by start_controller")
        return self._job

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Opens the job; a bad setting stops it with its message."""
        try:
            sites = sorted(client.name for client in self._engine.get_clients())
            name = self.run_name or job_name(fl_ctx)
            job = open_job(fl_ctx, name, self.federation, sites, self.resume)
            self._tracking = start_tracking(job, fl_ctx)
        except (ValueError, OSError) as error:
            self.system_panic(f"{type(error).__name__}: {error}", fl_ctx)
            return
        self._job, federation = job, job.federation
        self._min_clients = job.quorum
        self._start_round = job.start_round
        self._num_rounds = federation.rounds - job.start_round
        self._train_timeout = federation.train_timeout
        self._wait_time_after_min_received = federation.straggler_wait
        self._snapshot_every_n_rounds = 0
        job.write_description()
        self.log_info(
            fl_ctx,
            f"federation {job.run}: method {federation.method}, rank {federation.rank}, rule "
            f"{federation.rule}, {job.spec.parameters:,} parameters travel, rounds "
            f"{job.start_round} to {federation.rounds - 1}, sites {', '.join(sites)} of which "
            f"{job.quorum} must count; results in {job.folder.path}",
        )
        super().start_controller(fl_ctx)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The rounds, then the cross-site evaluation and the results."""
        if self._job is None:  # FLARE comes here after the panic of a bad setting, too
            return
        super().control_flow(abort_signal, fl_ctx)
        done = self._current_round == self.job.federation.rounds
        if not done or abort_signal.triggered:
            return
        try:
            self._score_models(abort_signal, fl_ctx)
            if not abort_signal.triggered:
                print(write_results(self.job, self._scores), flush=True)
        except Exception as error:
            self.log_exception(fl_ctx, "cross-site evaluation failed")
            self.system_panic(f"{type(error).__name__}: {error}", fl_ctx)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Starts the books of a round, and shows them once it is finished."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_STARTED:
            self.job.begin_round(self._current_round)
        elif event_type == AppEventType.ROUND_DONE and self._tracking is not None:
            self._tracking.hand_on()
        elif event_type == EventType.END_RUN and self._job is not None:
            if self._tracking is not None:
                self._tracking.close()
            run_dir = Path(workspace(fl_ctx).get_run_dir(fl_ctx.get_job_id()))
            self.job.folder.publish(run_dir / RESULTS)

    def broadcast_and_wait(self, task: Task, *arguments: Any, **options: Any) -> None:
        """FLARE's, a round's training to the sites that were drawn for it."""
        if task.name == messages.TRAIN:
            options["targets"] = list(self.job.taking_part)
        self._task = task
        super().broadcast_and_wait(task, *arguments, **options)
        gone = self.job.missing() if task.name == messages.TRAIN else []
        if gone and task.completion_status != TaskCompletionStatus.ABORTED:
            with self._engine.new_context() as fl_ctx:
                self.log_error(
                    fl_ctx, f"round {self._current_round}: no answer from {', '.join(gone)}"
                )

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        # The peer's own context holds whatever name the peer wrote there; this one is verified.
        fl_ctx.set_prop(messages.SENDER, client_name, private=True, sticky=False)
        why, code = "sent an update that is refused", result.get_return_code()
        if code and code != ReturnCode.OK:
            why = messages.reason_of(result)
            self.job.refuse(Refusal(client_name, self._current_round, "", why))
            self.log_error(fl_ctx, f"round {self._current_round}: site {client_name} {why}")
        accepted: bool = super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task)
        # An answer to an earlier round's task says nothing of this round.
        if not accepted and not is_unknown_task and client_name not in self.job.reports:
            self.job.failed[client_name] = why
            self._check_reach(fl_ctx)
        return accepted

    def _check_reach(self, fl_ctx: FLContext) -> None:
        """After an answer that does not count: one more is needed, and may be out of reach."""
        failed, drawn = self.job.failed, len(self.job.taking_part)
        if drawn - len(failed) < self.job.quorum:
            reasons = "; ".join(f"site {site} {why}" for site, why in sorted(failed.items()))
            self.system_panic(
                f"round {self._current_round}: {self.job.quorum} of {drawn} updates must count "
                f"(setting min_sites), and {drawn - len(failed)} are left: {reasons}",
                fl_ctx,
            )
        # FLARE counts answers of any kind; the quorum is of good ones.
        self._task.props[_KEY_MIN_RESPS] = min(drawn, self.job.quorum + len(failed))

    def _prepare_train_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        super()._prepare_train_task_data(client_task, fl_ctx)
        fl_ctx.set_prop(messages.RECEIVER, client_task.client.name, private=True, sticky=False)
        data = client_task.task.data
        if data.get_header(messages.RUN) is None:  # FLARE sends all sites one copy of the first's
            self._address(data, self._current_round)

    def _address(self, data: Shareable, round_index: int) -> None:
        """Adds to a task's message what a site must know to do and to check it."""
        data.set_header(messages.FEDERATION, self.job.federation.to_dict())
        data.set_header(messages.RUN, self.job.run)
        data.set_header(messages.TURNED, self.job.state.turned)
        data.set_header(messages.FIXED, content_sha256(self.job.fixed))
        if data.get("DXO") and data["DXO"].get("kind") == DataKind.WEIGHTS:
            data["DXO"]["meta"] = {
                messages.SPEC: self.job.spec.to_dict(),
                messages.ROUND: round_index,
            }

    def _score_models(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        models = models_to_score(self.job)
        self._models = tuple(models)
        self.log_info(fl_ctx, f"cross-site evaluation of {', '.join(models)}")
        rounds = self.job.federation.rounds
        data = DXO(
            DataKind.COLLECTION,
            data={
                name: messages.weights_dxo(tensors, spec, rounds)
                for name, (tensors, spec) in models.items()
            },
        ).to_shareable()
        self._address(data, rounds)
        self._bytes_down = messages.serialised_bytes(data)
        task = Task(
            name=messages.VALIDATE,
            data=data,
            timeout=self.job.federation.train_timeout,
            before_task_sent_cb=self._count_models,
            result_received_cb=self._receive_scores,
        )
        self.broadcast_and_wait(
            task=task,
            min_responses=self._min_clients,
            wait_time_after_min_received=self.job.federation.straggler_wait,
            fl_ctx=fl_ctx,
            abort_signal=abort_signal,
        )
        for client in self._engine.get_clients():
            self._note_missing(client, fl_ctx)
        if len(self._scores) < self.job.quorum:
            raise QuorumError(
                f"{len(self._scores)} sites scored the models ({', '.join(sorted(self._scores))}), "
                f"{self.job.quorum} needed (setting min_sites); the adapters are in "
                f"{self.job.folder.path}"
            )

    def _count_models(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        site, rounds = client_task.client.name, self.job.federation.rounds
        self.job.ledger.add(rounds, site, "down", self._bytes_down)

    def _receive_scores(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        site, result = client_task.client.name, client_task.result
        client_task.result = None
        count = messages.serialised_bytes(result)
        self.job.ledger.add(self.job.federation.rounds, site, "up", count)
        code = result.get_return_code()
        if code != ReturnCode.OK:
            why = messages.reason_of(result)
            self.log_error(fl_ctx, f"cross-site evaluation: site {site} {why}")
            return
        try:
            data = messages.read_dxo(result, DataKind.METRICS).data
            self._scores[site] = read_scores(
                data, site, self._models, self.job.federation.class_names
            )
        except Exception as error:  # whatever a site sends must not end the others' answers
            self.log_error(fl_ctx, f"REFUSED scores of site {site}: {printable(str(error), 200)}")

    def _note_missing(self, client: Client, fl_ctx: FLContext) -> None:
        if client.name not in self._scores:
            self.log_error(fl_ctx, f"no scores from site {client.name}")
