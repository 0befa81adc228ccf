"""Rounds handed on to a tracker as they are finished, without a round ever waiting for it."""

from __future__ import annotations

import queue
import re
import threading
from collections import deque
from typing import TYPE_CHECKING

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from flap_nvflare.flare.figures import ALL_SITES, round_figures
from flap_nvflare.flare.trackers import Tracker, make_tracker, not_installed
from flap_nvflare.settings import SettingsError

if TYPE_CHECKING:
    from flap_nvflare.flare.job import ServerJob

_LAST_WAIT = 60.0  # seconds for what is left when the job ends
_Record = tuple[str, int, dict[str, float]]


def start_tracking(job: ServerJob, fl_ctx: FLContext) -> Tracking | None:
    """Starts what setting `tracking` names; None for `none`.

    Raises:
        SettingsError: if it can't be started: a package is missing, or nobody answers there.
    """
    if job.federation.tracking == "none":
        return None
    tracking = Tracking(job, fl_ctx)
    tracking.hand_on()
    return tracking


class Tracking(FLComponent):
    """Reads the finished rounds from `rounds.jsonl`, so that a tracker can't say anything else.

    A thread of its own writes them. What a tracker does not take is offered again with the next
    round, in order; whatever becomes of it, `rounds.jsonl` has it all.
    """

    def __init__(self, job: ServerJob, fl_ctx: FLContext) -> None:
        super().__init__()
        self._job, self._fl_ctx = job, fl_ctx
        self._lines = 0  # of rounds.jsonl that have been handed on
        self._tracker = self._open({*job.sites, ALL_SITES})
        self.log_info(fl_ctx, f"tracking: {self._tracker.place}")
        self._waiting: deque[_Record] = deque()
        self._queue: queue.Queue[list[_Record] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="flap_tracking", daemon=True)
        self._thread.start()

    def hand_on(self) -> None:
        """Hands on the rounds finished since the last call; in a run that goes on, all of them."""
        lines = self._job.folder.rounds()[self._lines :]
        self._lines += len(lines)
        self._queue.put(
            [
                (origin, line["round"], figures)
                for line in lines
                for origin, figures in round_figures(line).items()
            ]
        )

    def close(self) -> None:
        """Writes what is left and ends the tracker, unless that takes too long."""
        self._queue.put(None)
        self._thread.join(_LAST_WAIT)
        if self._thread.is_alive():
            self._warn(f"no answer after {_LAST_WAIT:g} s; {self._left()}")

    def _open(self, origins: set[str]) -> Tracker:
        name = self._job.federation.tracking
        try:
            tracker = make_tracker(self._job, self._fl_ctx)
            self._first = {origin: tracker.open(origin) for origin in sorted(origins)}
        except ImportError as error:
            raise not_installed(name, error) from error
        except Exception as error:  # of a package that has its own
            raise SettingsError(
                f"setting tracking: {name} can't be started: {_said(error)}"
            ) from error
        return tracker

    def _work(self) -> None:
        while (records := self._queue.get()) is not None:
            self._waiting.extend(records)
            self._send()
        self._send()
        try:
            self._tracker.close(whole=self._lines == self._job.federation.rounds)
        except Exception as error:
            self._warn(f"not closed: {_said(error)}")

    def _send(self) -> None:
        while self._waiting:
            origin, step, figures = self._waiting[0]
            try:
                if origin not in self._first:  # a site that came later, or has gone since
                    self._first[origin] = self._tracker.open(origin)
                if step >= self._first[origin]:
                    self._tracker.save(origin, step, figures)
            except Exception as error:  # no fault of a tracker may touch the federation
                self._warn(f"{_said(error)}; {self._left()}")
                return
            self._waiting.popleft()

    def _warn(self, message: str) -> None:
        # Without an event of FLARE's: whoever listened to it would run in this thread.
        self.log_warning(self._fl_ctx, f"tracking: {message}", fire_event=False)

    def _left(self) -> str:
        return f"{len(self._waiting)} records wait; {self._job.folder.path}/rounds.jsonl has them"


def _said(error: Exception) -> str:
    """In one line, without the password that a tracker's address may hold."""
    return re.sub(r"//[^/\s]*@", "//", " ".join(str(error).split()))
