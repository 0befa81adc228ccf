"""TensorBoard and MLflow behind one small interface, each written by FLARE's own receiver.

FLARE's receivers take figures as events, and know a site by the event's sender. Here the server is
the sender of them all, so they are called with the site's name instead of through events, which
FLARE would send on to the sites. Nothing of either package is imported before a job asks for it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from nvflare.apis.analytix import AnalyticsData, AnalyticsDataType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext

from flap_nvflare.flare.figures import ALL_SITES
from flap_nvflare.settings import SettingsError

if TYPE_CHECKING:
    from flap_nvflare.flare.job import ServerJob

URI_VARIABLE = "MLFLOW_TRACKING_URI"
_MLFLOW_RUNS = "mlflow.json"  # in the run's folder: the MLflow run by site
# Where the server's own environment does not say otherwise. A hospital's server tells nobody what
# it runs; and MLflow would try for over four minutes to reach a server that does not answer, where
# a job that begins should stop, and one that runs tries again with its next round.
_MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_RECEIVERS = {
    "tensorboard": ("nvflare.app_opt.tracking.tb.tb_receiver", "TBAnalyticsReceiver"),
    "mlflow": ("nvflare.app_opt.tracking.mlflow.mlflow_receiver", "MLflowReceiver"),
}


class Tracker(Protocol):
    """A place for figures.

    Attributes:
        place: where a person finds them, as a command that shows them.
    """

    place: str

    def open(self, origin: str) -> int:
        """Makes room for a site's figures; returns the first round that is not there yet."""

    def save(self, origin: str, step: int, figures: Mapping[str, float]) -> None:
        """Writes a site's figures of one round; where it raises, they are to be offered again."""

    def close(self, whole: bool) -> None:
        """Ends it; `whole` says whether the run has come to its end."""


def receiver_class(tracking: str) -> Any:
    """FLARE's receiver for a value of setting `tracking`; None for `none`.

    Raises:
        SettingsError: if its package is not installed here.
    """
    if tracking == "none":
        return None
    module, name = _RECEIVERS[tracking]
    if tracking == "mlflow":
        for variable, value in _MLFLOW_DEFAULTS.items():
            os.environ.setdefault(variable, value)
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise not_installed(tracking, error) from error


def not_installed(tracking: str, error: ImportError) -> SettingsError:
    """What to say where a package of the tracker is missing."""
    return SettingsError(
        f"setting tracking: {tracking} needs a package that this server lacks ({error}); "
        "pip install 'flap_nvflare[tracking]' there, or set tracking: none"
    )


def make_tracker(job: ServerJob, fl_ctx: FLContext) -> Tracker:
    """The tracker that the job's settings name."""
    if job.federation.tracking == "tensorboard":
        return TensorBoard(job, fl_ctx)
    return MLflow(job, fl_ctx)


class TensorBoard:
    """Event files in `tensorboard/<site>` of the run's folder, in place of FLARE's `tb_events`.

    A simulator's workspace is wiped at every start; the run's folder is not, and runs beside each
    other can be compared. Event files can't be cut back to the last finished round, so a run that
    goes on writes them anew.
    """

    def __init__(self, job: ServerJob, fl_ctx: FLContext) -> None:
        folder = job.folder.path / "tensorboard"
        if folder.exists():
            shutil.rmtree(folder)
        self.place = f"tensorboard --logdir {job.folder.path.parent}"
        self._fl_ctx = fl_ctx
        self._receiver = receiver_class("tensorboard")()
        self._receiver.root_log_dir = str(folder)  # all that the receiver's `initialize` does

    def open(self, origin: str) -> int:
        """Nothing to do: a site's folder is made with its first figure."""
        return 0

    def save(self, origin: str, step: int, figures: Mapping[str, float]) -> None:
        """One scalar a figure, written out at once; the receiver alone would wait two minutes."""
        context = _as_site(self._fl_ctx, origin)
        for tag, figure in figures.items():
            data = AnalyticsData(tag, figure, AnalyticsDataType.SCALAR, global_step=step)
            self._receiver.save(context, data.to_dxo().to_shareable(), origin)
        self._receiver.writers_table[origin].flush()

    def close(self, whole: bool) -> None:
        """Closes the files."""
        self._receiver.finalize(self._fl_ctx)


class MLflow:
    """One MLflow run a site and one for all, in an experiment of the job's name.

    They lie where MLFLOW_TRACKING_URI of the server's own environment says, else in `mlflow.db` of
    the run's folder: no job can send figures elsewhere. A run that goes on does so in the same
    MLflow runs.
    """

    def __init__(self, job: ServerJob, fl_ctx: FLContext) -> None:
        from mlflow.tracking.client import MlflowClient

        local = f"sqlite:///{job.folder.path / 'mlflow.db'}"
        uri = os.environ.get(URI_VARIABLE) or local
        self.place = f"mlflow ui --backend-store-uri {local}"
        if uri != local:
            self.place = f"the server that {URI_VARIABLE} names"
        self._job, self._fl_ctx = job, fl_ctx
        self._client = MlflowClient(tracking_uri=uri)
        path = job.folder.path / _MLFLOW_RUNS
        self._known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._receiver = receiver_class("mlflow")(
            tracking_uri=uri,
            kw_args={
                "experiment_name": job.folder.path.parent.name,
                "experiment_tags": {},
                "run_name": job.folder.path.name,
            },
            buffer_flush_time=0,
        )

    def open(self, origin: str) -> int:
        """Takes up the site's MLflow run of this federation, or makes it."""
        receiver, step = self._receiver, self._next_step(origin)
        if step is not None:  # the receiver makes no run for a site that it has a client for
            receiver.mlflow_clients[origin] = self._client
            receiver.run_ids[origin] = self._known[origin]
        receiver.kw_args["run_tags"] = {"run": self._job.run, "site": origin}
        receiver.initialize(_as_site(self._fl_ctx, origin))
        if step is not None:
            self._client.update_run(self._known[origin], status="RUNNING")
            return step
        self._known[origin] = receiver.run_ids[origin]
        self._job.folder.write_json(_MLFLOW_RUNS, self._known)
        if origin == ALL_SITES:
            values = {**self._job.federation.to_dict(), "base_sha256": self._job.spec.base_sha256}
            settings = {name: str(value) for name, value in values.items()}
            self._send(origin, AnalyticsDataType.PARAMETERS, settings)
        return 0

    def save(self, origin: str, step: int, figures: Mapping[str, float]) -> None:
        """All figures of the round in one request."""
        named = {_mlflow_name(tag): figure for tag, figure in figures.items()}
        self._send(origin, AnalyticsDataType.METRICS, named, global_step=step)

    def close(self, whole: bool) -> None:
        """Ends the MLflow runs, as failed where the federation has not come to its end."""
        self._receiver.finalize(self._fl_ctx)
        if not whole:
            for run_id in self._receiver.run_ids.values():
                self._client.set_terminated(run_id, status="FAILED")

    def _send(self, origin: str, kind: AnalyticsDataType, values: Any, **step: int) -> None:
        data = AnalyticsData("round", values, kind, **step)
        self._receiver.save(_as_site(self._fl_ctx, origin), data.to_dxo().to_shareable(), origin)

    def _next_step(self, origin: str) -> int | None:
        """The first round that the site's MLflow run lacks; None if it has no run there."""
        from mlflow.exceptions import MlflowException

        if origin not in self._known:
            return None
        run_id = self._known[origin]
        try:
            if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                return None
        except MlflowException:  # it began at another tracking server, or without one
            return None
        # `refused` is among the figures of every site in every round.
        steps = [one.step for one in self._client.get_metric_history(run_id, "refused")]
        return max(steps, default=-1) + 1


def _as_site(fl_ctx: FLContext, origin: str) -> FLContext:
    """A context of its own for the receiver, in which only `origin` takes part."""
    context = FLContext()
    for name in (ReservedKey.ENGINE, ReservedKey.RUN_NUM, ReservedKey.JOB_META):
        context.put(name, fl_ctx.get_prop(name), private=True, sticky=False)
    context.put(ReservedKey.IDENTITY_NAME, origin, private=False, sticky=False)
    return context


def _mlflow_name(tag: str) -> str:
    """The tag without the signs of a class's name that MLflow refuses, by their code: `:28`."""
    return re.sub(r"[^/\w.\- :]", lambda sign: f":{ord(sign[0]):x}", tag)
