"""The launcher that starts a site's job process again when something killed it.

FLARE fails a whole job, whatever its quorum, once one site reports that its process ended by
itself. A process that a signal ended (no memory left, a fault of a driver, someone's kill) has
done nothing wrong: it is started again with the same command, joins the job again under the same
name, and FLARE's server sends it the task that it has not answered. Site and server keep all that
a round needs on disk, so the round is done again with the same result. A whole site that was cut
off and is started again goes on with its jobs in the same way.

In the site's `local/resources.json` it stands in place of FLARE's own launcher, as
`custom/local/resources.json` has it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, JobConstants
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle

from flap_nvflare.flare.running_jobs import (
    CREDENTIALS,
    RunningJob,
    RunningJobs,
    end_left_over,
)

# Exit codes by which FLARE's process says how the job ended: no accident.
_SAID = frozenset(
    {
        JobReturnCode.SUCCESS,
        JobReturnCode.EXECUTION_ERROR,
        JobReturnCode.ABORTED,
        JobReturnCode.EXCEPTION,
        JobReturnCode.UNSAFE_COMPONENT,
        JobReturnCode.CONFIG_ERROR,
        JobReturnCode.INFRASTRUCTURE_ERROR,
    }
)
_LONGEST_WAIT = 300.0


class RestartingLauncher(ClientProcessJobLauncher):
    """FLARE's launcher of job processes, which also starts one again that was killed.

    Args:
        restarts: how often in one job; 0 never.
        wait: seconds before the first restart, twice as long before each further one, at most
            five minutes.

    Raises:
        ValueError: if one of them is negative.
    """

    def __init__(self, restarts: int = 3, wait: float = 2.0) -> None:
        super().__init__()
        if restarts < 0 or wait < 0:
            raise ValueError(
                f"RestartingLauncher: restarts is {restarts}, wait is {wait}; give numbers from 0 "
                "in local/resources.json"
            )
        self.restarts = restarts
        self.wait = wait
        self._left: dict[str, RunningJob] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Offers itself for every job; at the site's start goes on with those that were cut off."""
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.SYSTEM_START:
            self._go_on(fl_ctx)

    def _go_on(self, fl_ctx: FLContext) -> None:
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        jobs = RunningJobs(Path(workspace.get_root_dir()))
        for one in jobs.left():
            jobs.forget(one.job)
            end_left_over(one)
            if one.returns >= self.restarts:
                self.logger.warning(f"job {one.job}: was cut off {one.returns + 1} times; left")
                continue
            try:
                meta = Path(workspace.get_job_meta_path(one.job)).read_text(encoding="utf-8")
                self._left[one.job] = one
                said = fl_ctx.get_engine().start_app(one.job, json.loads(meta))
                self.logger.warning(f"job {one.job}: was cut off, goes on here: {said}")
            except Exception as error:  # the site must come up whatever a job's folder holds
                self.logger.warning(f"job {one.job}: can't go on: {type(error).__name__}: {error}")
            finally:
                self._left.pop(one.job, None)

    def launch_job(self, job_meta: dict, fl_ctx: FLContext) -> JobHandleSpec:
        """Starts the job's process and stays by it."""
        job = str(job_meta.get(JobConstants.JOB_ID))
        root = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        said, jobs = root / job / FLMetaKey.PROCESS_RC_FILE, RunningJobs(root)
        arguments = dict(fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS) or {})
        before = self._left.get(job)
        if before is not None:  # the server knows the site in this job by its login of then
            for name in CREDENTIALS:
                arguments[name] = (arguments[name][0], before.credentials[name])
            fl_ctx.set_prop(FLContextKey.JOB_PROCESS_ARGS, arguments, private=True, sticky=False)
        credentials = {name: arguments[name][1] for name in CREDENTIALS if name in arguments}
        returns = 0 if before is None else before.returns + 1

        def tell(text: str) -> None:
            self.logger.warning(f"job {job}: {text}")

        def launch() -> ProcessHandle:
            process = super(RestartingLauncher, self).launch_job(job_meta, fl_ctx)
            try:
                jobs.note(RunningJob(job, process.adapter.pid, returns, credentials))
            except OSError as error:  # the process runs all the same
                tell(f"not noted as running: {type(error).__name__}: {error}")
            return process

        return RestartedProcess(
            launch,
            said.exists,
            self.restarts,
            self.wait,
            tell,
            lambda: jobs.forget(job),
        )


class RestartedProcess(JobHandleSpec):
    """A job's process, and those started after it; to FLARE they are one.

    Args:
        launch: starts the process.
        said: whether the process has written down how the job ended, in FLARE's own file.
        restarts: how often a killed one is started again.
        wait: seconds before the first restart.
        tell: told of every restart, for the site's log.
        ended: called when the job has ended here.
    """

    def __init__(
        self,
        launch: Callable[[], ProcessHandle],
        said: Callable[[], bool],
        restarts: int,
        wait: float,
        tell: Callable[[str], None],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._launch, self._said, self._tell, self._forget = launch, said, tell, ended
        self._restarts, self._wait = restarts, wait
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._outcome: int | None = None
        self._process = launch()

    def terminate(self) -> None:
        """Ends the process for good: a job that was aborted, or a site that is shut down."""
        self._ended.set()
        with self._lock:
            self._process.terminate()

    def poll(self) -> int:
        """FLARE's code of how the job ended here; UNKNOWN while it runs.

        A process that was killed more often than it may be ends as UNKNOWN too. That is no
        failure of the job to FLARE's server: it misses the site, and the quorum decides.
        """
        return JobReturnCode.UNKNOWN if self._outcome is None else self._outcome

    def wait(self) -> None:
        """Returns once the process has ended and is not started again."""
        done = 0
        while self._outcome is None:
            self._process.wait()
            code = self._process.adapter.poll()
            if self._ended.is_set() or code in _SAID or self._said():
                self._outcome = self._process.poll()
            elif done == self._restarts:
                self._tell(f"its process {_ended_by(code)} once more; not started again")
                self._outcome = JobReturnCode.UNKNOWN
            else:
                done += 1
                self._again(code, done)
        self._forget()

    def _again(self, code: int | None, done: int) -> None:
        pause = min(self._wait * 2 ** (done - 1), _LONGEST_WAIT)
        self._tell(
            f"its process {_ended_by(code)}; started again in {pause:g} s "
            f"(restart {done} of {self._restarts})"
        )
        self._ended.wait(pause)
        with self._lock:  # no process may be started behind the back of `terminate`
            if self._ended.is_set():
                return
            try:
                self._process = self._launch()
            except Exception as error:  # FLARE's waiting thread must come to its end
                self._tell(f"its process can't be started again: {type(error).__name__}: {error}")
                self._outcome = JobReturnCode.UNKNOWN


def _ended_by(code: int | None) -> str:
    if code is None:
        return "ended"
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
