"""A server that was killed and started again: jobs that FLARE would show as running for ever.

FLARE 2.9 takes up no job after a restart of the server, and leaves those that ran as RUNNING:
they can't be aborted, fetched or deleted. Its own way to close them exists and is not called.
"""

from __future__ import annotations

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext


class AbandonedJobs(FLComponent):
    """Closes, at the start of a server, the jobs that its last process left: FINISHED:ABANDONED.

    A component of the server's own `local/resources.json`. The same job submitted again goes on
    after the last finished round (`FlapController`, argument `resume`).
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """At the start of the server's parent process, before it schedules jobs."""
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            fl_ctx.get_engine().job_runner.update_unfinished_jobs(fl_ctx)
