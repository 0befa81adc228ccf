"""FLARE's `error_log.txt` of a job, which a site may upload: nothing of a case may be in it.

FLARE writes there what any library logs as an error, with its text and its traceback: an engine
that fails on a scan names the scan's file. A site turns the upload off by `allow_log_streaming:
false` in its `resources.json`. For a site that does not, the file is kept bare: time, logger, place
in the code and the type of an error. Only this package's own FLARE components keep their text,
which is written for it. A text that FLARE or a library logs stays whole in the site's `log.txt`,
which is not uploaded.

FLARE's components also fire their warnings and errors as events. A widget of FLARE keeps these for
the administrator's `show_errors`, so they are hushed in the same way.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nvflare.apis.analytix import TrackConst
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.security.logging import SECURE_LOGGING_VAR_NAME

from flap_nvflare.adapter.guard import printable

ERROR_LOG = "error_log.txt"
LOG_EVENTS = (
    EventType.CRITICAL_LOG_AVAILABLE,
    EventType.ERROR_LOG_AVAILABLE,
    EventType.WARNING_LOG_AVAILABLE,
    EventType.EXCEPTION_LOG_AVAILABLE,
    EventType.INFO_LOG_AVAILABLE,
)
_OWN = "flap_nvflare.flare."
_HUSHED = "see the site's own log"

Process = Callable[[Any, Shareable, FLContext], Shareable]


class BareFormatter(logging.Formatter):
    """A record without the text that others put into it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        time = self.formatTime(record)
        kind = record.exc_info[0] if record.exc_info else None
        text = f" - {record.getMessage()}" if record.name.startswith(_OWN) else ""
        error = f" - {kind.__name__}" if kind is not None else ""
        place = f"{record.module}:{record.lineno}"
        line = f"{time} - {record.name} - {record.levelname} - {place}{error}{text}"
        return "".join(c if c.isprintable() else "?" for c in line)


def keep_error_log_bare() -> int:
    """Sets the formatter of every handler in this process that writes an `error_log.txt`.

    If there is one, FLARE's own log functions say only the types of errors from then on, as in its
    secure mode.

    Returns:
        The handlers found.
    """
    found = 0
    for handler in _handlers():
        if Path(getattr(handler, "baseFilename", "")).name == ERROR_LOG:
            handler.setFormatter(BareFormatter())
            found += 1
    if found:
        os.environ[SECURE_LOGGING_VAR_NAME] = "true"
    return found


def hush(fl_ctx: FLContext) -> None:
    """Takes the text out of a log event, before the handlers that come after this one get it."""
    if fl_ctx.get_prop(FLContextKey.EVENT_ORIGIN) == "FlapExecutor":  # its texts are made for it
        return
    event = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
    body = event.get("DXO") if isinstance(event, dict) else None
    data = body.get("data") if isinstance(body, dict) else None
    if isinstance(data, dict):
        dict.clear(data)
        data.update({TrackConst.TRACK_KEY: "log", TrackConst.TRACK_VALUE: _HUSHED})
    elif isinstance(event, dict):
        dict.clear(event)


def _handlers() -> Iterator[logging.Handler]:
    yield from logging.getLogger().handlers
    for logger in list(logging.Logger.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            yield from logger.handlers


def tells_why(process: Process) -> Process:
    """A filter's `process` whose errors are in the log of the machine that it runs on.

    FLARE logs there the type of an error alone while its error log is kept bare. A warning
    with no event goes to no file that FLARE uploads.
    """

    @functools.wraps(process)
    def told(self: Any, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        try:
            return process(self, shareable, fl_ctx)
        except Exception as error:
            text = f"stopped a message: {type(error).__name__}: {error}"
            self.log_warning(fl_ctx, printable(text, 400), fire_event=False)
            raise

    return told
