"""The site's last gate: whatever a job's filters and components do, this decides what leaves.

A component of the site's own `local/privacy.json`, which FLARE builds in each job's process, after
the job's components and only if the file has a scope:

    {"scopes": [{"name": "site"}], "default_scope": "site",
     "components": [{"id": "last_gate", "path": "flap_nvflare.flare.last_gate.LastGate"}]}

FLARE runs a site's filters before the job's, so a filter that came with the job may add to what
the site's have passed. The gate looks when all filters are done (`AFTER_TASK_RESULT_FILTER`), and
once more at the door through which every result goes, `engine.send_task_result`: replies to failed
filters come by no event. What may not leave loses all its data and becomes an error reply. Then
the audit file gets its line, and only then FLARE gets the message. `WireGate` closes the other
ways out of the process.

In doubt nothing leaves: a fault of the gate itself stops the message, a gate that can't start stops
the job at this site, and without the line in the audit file the message waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.fuel.utils import fobs

from flap_nvflare.flare import messages
from flap_nvflare.flare.asked import Asked, TaskReader
from flap_nvflare.flare.audit import SiteAudit, result_filters
from flap_nvflare.flare.context import workspace
from flap_nvflare.flare.error_log import LOG_EVENTS, hush, keep_error_log_bare
from flap_nvflare.flare.header_check import bare_error
from flap_nvflare.flare.reply_check import check_reply
from flap_nvflare.flare.wire_gate import WireGate
from flap_nvflare.site.audit_log import ACCEPTED, BLOCKED, IN, OUT, REFUSED, SENT, AuditError
from flap_nvflare.site.reasons import CODE, SiteError
from flap_nvflare.site.site_file import SITE_FILE, Limits, read_site_file

SERVER = "server"
_PUBLIC = 64, 2000  # most public properties of the context, and characters in them


@dataclass
class _Task:
    """The task under way: what it asked, its message as it came, and what was told of it."""

    asked: Asked
    bytes: int
    sha256: str
    told: str = ""


def _limits(path: Path) -> Limits:
    return read_site_file(path).limits if path.is_file() else Limits()


class LastGate(FLComponent):
    """Stops every reply that is not what its task asked for, and keeps the audit file."""

    def __init__(self) -> None:
        super().__init__()
        keep_error_log_bare()
        self._audit: SiteAudit | None = None
        self._file: Path | None = None
        self._wire: WireGate | None = None
        self._send: Callable[..., bool] | None = None
        self._task: _Task | None = None
        self._reader = TaskReader()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Opens the gate for a job, and looks at each of its tasks and results."""
        if event_type == EventType.ABOUT_TO_START_RUN:
            self._guarded(self._start, fl_ctx)
        elif event_type == EventType.BEFORE_TASK_DATA_FILTER:
            self._task = None
            self._guarded(self._arrived, fl_ctx)
        elif event_type == EventType.BEFORE_TASK_EXECUTION:
            self._guarded(self._tell_arrival, fl_ctx)
        elif event_type == EventType.AFTER_TASK_RESULT_FILTER:
            reply = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
            if isinstance(reply, dict):
                self._judge(reply, fl_ctx)
        elif event_type in LOG_EVENTS:
            hush(fl_ctx)

    # ---- start -------------------------------------------------------------------------------
    def _guarded(self, step: Callable[[FLContext], None], fl_ctx: FLContext) -> None:
        """FLARE logs what a handler raises and goes on; here the job ends at this site."""
        try:
            step(fl_ctx)
        except Exception as error:
            self._own_log(fl_ctx, f"the last gate: {type(error).__name__}: {error}")
            name = type(error).__name__
            self.system_panic(f"the site's last gate can't work ({name}); see its log", fl_ctx)

    def _start(self, fl_ctx: FLContext) -> None:
        self._file = Path(workspace(fl_ctx).get_site_config_dir()) / SITE_FILE
        _limits(self._file)  # a bad file stops the job here
        self._audit = SiteAudit(fl_ctx)
        engine = fl_ctx.get_engine()
        self._wire = WireGate(engine.get_cell(), self._tell_stopped)
        self._send = engine.send_task_result
        engine.send_task_result = self._door

    # ---- what comes in -----------------------------------------------------------------------
    def _arrived(self, fl_ctx: FLContext) -> None:
        data = fl_ctx.get_prop(FLContextKey.TASK_DATA)
        blob = fobs.dumps(data)
        asked = self._reader.read(data, fl_ctx)
        if asked.federation is None:
            self._own_log(fl_ctx, f"task {asked.task} has no settings that can be read")
        self._task = _Task(asked, len(blob), hashlib.sha256(blob).hexdigest())

    def _tell_arrival(self, fl_ctx: FLContext, outcome: str = ACCEPTED, reason: str = "") -> None:
        if self._task is None or self._task.told in (outcome, REFUSED) or self._audit is None:
            return
        asked = self._task.asked
        self._audit.write(
            IN,
            outcome,
            reason=reason,
            bytes=self._task.bytes,
            sha256=self._task.sha256,
            **_about(asked, fl_ctx),
        )
        self._task.told = outcome

    # ---- what goes out -----------------------------------------------------------------------
    def _judge(self, reply: dict[str, Any], fl_ctx: FLContext) -> None:
        """Leaves a reply that may go as it is, and makes a bare error reply of any other."""
        asked = self._task.asked if self._task is not None else Asked(_task_of(fl_ctx))
        code, said = "", {}
        try:
            if _code(reply) == ReturnCode.OK:
                code = ReturnCode.TASK_RESULT_FILTER_ERROR
                self._check(reply, asked, fl_ctx)
                return
        except Exception as error:  # a fault of the check stops the message as well
            self._own_log(fl_ctx, f"BLOCKED the reply to {asked.task}: {error}")
            self._tell_blocked(reply, asked, fl_ctx, error)
            said = {messages.REASON: error.to_dict()} if isinstance(error, SiteError) else {}
        _strip(reply, {**bare_error(reply, asked, code), **said})

    def _check(self, reply: dict[str, Any], asked: Asked, fl_ctx: FLContext) -> None:
        if self._file is None or self._send is None:
            raise ContentBlockedException("the gate was never opened for this job")
        if not isinstance(reply, Shareable):
            raise ContentBlockedException("a reply of another type")
        limits = _limits(self._file)  # as the file says now, not as it said when the job began
        if asked.federation is not None:
            limits.check(asked.federation)
        _check_context(fl_ctx)
        check_reply(reply, asked, limits.max_update_mb)

    def _door(self, result: Shareable, fl_ctx: FLContext, timeout: float | None = None) -> bool:
        """In the place of the engine's: False, as after a failed send, lets FLARE try again.

        A copy is judged, told and sent: nobody else holds it and could change it meanwhile.
        """
        assert self._send is not None
        assert self._wire is not None
        try:
            self._judge(result, fl_ctx)  # what may not leave may not be fit to be copied
            sent = fobs.loads(fobs.dumps(result))
            self._judge(sent, fl_ctx)
            size = self._tell_leaving(sent, fl_ctx)
        except Exception as error:
            self._own_log(fl_ctx, f"nothing leaves: {type(error).__name__}: {error}")
            return False
        with self._wire.result(size):
            return bool(self._send(sent, fl_ctx, timeout))

    def _tell_leaving(self, result: Shareable, fl_ctx: FLContext) -> int:
        """Writes the lines of the task and its reply; returns the reply's bytes."""
        if self._audit is None:
            raise AuditError("the audit file was never opened")
        asked = self._task.asked if self._task is not None else Asked(_task_of(fl_ctx))
        code, value = _code(result), result.get_header(messages.REASON)
        reason = value.get(CODE, "") if isinstance(value, dict) else ""
        if code in (ReturnCode.TASK_DATA_FILTER_ERROR, ReturnCode.BAD_TASK_DATA):
            self._tell_arrival(fl_ctx, REFUSED, reason or code)
        else:
            self._tell_arrival(fl_ctx)
        return self._audit.write_message(
            OUT,
            SENT,
            result,
            reason=reason,
            return_code=code,
            filters=result_filters(fl_ctx, asked.task) if code == ReturnCode.OK else (),
            **_about(asked, fl_ctx),
        )

    def _tell_blocked(
        self, reply: dict[str, Any], asked: Asked, fl_ctx: FLContext, error: Exception
    ) -> None:
        about = {**_about(asked, fl_ctx), "reason": str(error)}
        try:
            assert self._audit is not None
            try:
                names = result_filters(fl_ctx, asked.task)
                self._audit.write_message(OUT, BLOCKED, Shareable(reply), filters=names, **about)
            except AuditError:
                raise
            except Exception:  # what can't be serialised has no bytes
                self._audit.write(OUT, BLOCKED, **about)
        except Exception as fault:  # it is blocked all the same
            self._own_log(fl_ctx, f"not in the audit file: {type(fault).__name__}: {fault}")

    def _tell_stopped(self, way: str, size: int, reason: str) -> None:
        assert self._audit is not None
        self._audit.write(OUT, BLOCKED, task=way, bytes=size, reason=f"{way}: {reason}")

    def _own_log(self, fl_ctx: FLContext, text: str) -> None:
        # Not at the level of an error, which FLARE may upload, and with no event, which a job's
        # component may carry away.
        self.log_warning(fl_ctx, text, fire_event=False)


def _about(asked: Asked, fl_ctx: FLContext) -> dict[str, Any]:
    peer = fl_ctx.get_peer_context()
    name = peer.get_identity_name() if isinstance(peer, FLContext) else SERVER
    return {
        "run": asked.run[:200],
        "round": asked.round_index,
        "task": asked.task,
        "peer": str(name or SERVER)[:200],
    }


def _code(reply: dict[str, Any]) -> str:
    headers = reply.get(ReservedHeaderKey.HEADERS)
    code = headers.get(ReservedHeaderKey.RC) if isinstance(headers, dict) else None
    return ReturnCode.OK if code is None else str(code)


def _strip(reply: dict[str, Any], headers: dict[str, Any]) -> None:
    """FLARE holds this very object; so it is emptied, past whatever its class may do instead."""
    dict.clear(reply)
    dict.__setitem__(reply, ReservedHeaderKey.HEADERS, headers)


def _task_of(fl_ctx: FLContext) -> str:
    return str(fl_ctx.get_prop(FLContextKey.TASK_NAME, ""))


def _check_context(fl_ctx: FLContext) -> None:
    """FLARE sends the context's public properties along with every message."""
    most, longest = _PUBLIC
    public, characters = fl_ctx.get_all_public_props(), 0
    for name, value in public.items():
        if type(value) not in (str, int, float, bool, type(None)):
            raise ContentBlockedException(f"public property of type {type(value).__name__}")
        characters += len(str(name)) + (len(value) if isinstance(value, str) else 0)
    if len(public) > most or characters > longest:
        raise ContentBlockedException("more public properties than FLARE's own")
