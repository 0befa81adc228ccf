"""The gate at the cell: which kinds of message leave a job's process at all, and how large.

A task's result is one way out of a site's job process. FLARE 2.9 has others, and each is a channel
and a topic of its cell:

| way | channel, topic | here |
|---|---|---|
| asking for a task, asking whether it still counts | server_command, aux | up to 16 KiB |
| a task's result | server_command, submit_update | while `LastGate` sends one |
| its tensors, fetched by the server | download_service__ | as many bytes as the results had |
| answers to the server's own requests | return_only | up to 16 KiB, no task that it pushes |
| events for the whole federation, analytics among them | aux, fed.event | stopped |
| streams of objects and of logs, `error_log.txt` among them | aux, ObjectStreamer.* | stopped |
| messages between sites; anything a component invents | | stopped |
| what stays at the site | to its own parent process | passes |

The site's own process, the parent of its jobs, has ways out that no component of a job sees; the
kit's `local` folder decides about them:

- It uploads each job's `error_log.txt`, unless `resources.json` says
  `"allow_log_streaming": false`.
- An administrator may ask for `cat`, `head`, `tail` and `grep` of its files, unless
  `authorization.json` says `"shell_commands": "none"` for every role.
- `show_errors` and `show_stats` bring what components told FLARE's collector: texts are hushed
  (`error_log`), figures of FLARE's components pass.
- Top-level keys of `resources.json` that FLARE does not know go to the server when the site
  registers: none may hold a path or a secret.

The cell calls the gate for each frame right before it goes to the driver; an error in it stops
the frame.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from nvflare.apis.fl_constant import ReservedTopic, ServerCommandNames
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, MessageHeaderKey
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.download_service import (
    OBJ_DOWNLOADER_CHANNEL,
    OBJ_DOWNLOADER_TOPIC,
    SOURCE_FAILURE_TOPIC,
)
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_CHANNEL,
    STREAM_DATA_TOPIC,
    StreamHeaderKey,
)

SMALL = 16 * 1024  # bytes of a message that carries no result
_AUX, _ANSWER = CellChannel.AUX_COMMUNICATION, CellChannel.RETURN_ONLY
_SUBMIT = (CellChannel.SERVER_COMMAND, ServerCommandNames.SUBMIT_UPDATE)
_TENSORS = (_ANSWER, f"{OBJ_DOWNLOADER_CHANNEL}:{OBJ_DOWNLOADER_TOPIC}")
_SMALL_ONES = {
    (CellChannel.SERVER_COMMAND, ServerCommandNames.GET_TASK),
    (_AUX, ReservedTopic.SYNC_RUNNER),
    (_AUX, ReservedTopic.JOB_HEART_BEAT),
    (_AUX, ReservedTopic.TASK_CHECK),
    (OBJ_DOWNLOADER_CHANNEL, OBJ_DOWNLOADER_TOPIC),
    (OBJ_DOWNLOADER_CHANNEL, SOURCE_FAILURE_TOPIC),
    (_ANSWER, f"{OBJ_DOWNLOADER_CHANNEL}:{SOURCE_FAILURE_TOPIC}"),
    (_ANSWER, f"{_AUX}:{ReservedTopic.END_RUN}"),
    (_ANSWER, f"{_AUX}:{ReservedTopic.ABORT_ASK}"),
    (_ANSWER, f"{_AUX}:{ReservedTopic.SYNC_RUNNER}"),
    (_ANSWER, f"{_AUX}:{ReservedTopic.TASK_CHECK}"),
    (_ANSWER, f"{_AUX}:{ReservedTopic.JOB_HEART_BEAT}"),
    (CellChannel.CELLNET, CellChannelTopic.Bye),
}
# A fetch that failed on the way is asked for again.
_TIMES_FETCHED = 3
_TOLD = 100  # times that the same way is told to the audit file


class WireGate:
    """Stops what is not in the table.

    Args:
        cell: the job process's cell.
        tell: is called with channel/topic, bytes and reason of what was stopped.
    """

    def __init__(self, cell: Any, tell: Callable[[str, int, str], None]) -> None:
        core = cell.core_cell
        self._own = str(core.get_fqcn())
        self._tell = tell
        self._lock = threading.Lock()
        self._results = 0
        self._left = 0
        self._told: Counter[str] = Counter()
        core.add_outgoing_request_filter("*", "*", self.outgoing)
        core.add_outgoing_reply_filter("*", "*", self.outgoing)
        core.add_incoming_request_filter("*", "*", self.incoming)

    def result(self, size: int) -> Result:
        """A block in which a result of so many bytes may be sent."""
        return Result(self, size)

    def outgoing(self, message: Message) -> Message | None:
        """None lets the frame pass."""
        if self._stays(message):
            return None
        channel, topic = _way(message)
        size = 0 if message.payload is None else _size(message.payload)
        fault = self._fault(channel, topic, size)
        if fault is None:
            return None
        way = f"{channel}/{topic}"
        self._told[way] += 1
        if self._told[way] <= _TOLD:
            self._tell(way, size, fault)
        return make_reply(CellReturnCode.FILTER_ERROR)

    def incoming(self, message: Message) -> Message | None:
        """The server may not push a task: only one that the site asked for passes `LastGate`."""
        if _way(message)[1] == ReservedTopic.DO_TASK:
            return make_reply(CellReturnCode.FILTER_ERROR)
        return None

    def _fault(self, channel: str, topic: str, size: int) -> str | None:
        way = (channel, topic)
        if way == _SUBMIT:
            return None if self._results else "a result that did not come by the last gate"
        if way == _TENSORS:
            with self._lock:
                if size > self._left:
                    return "more tensors than the results had"
                self._left -= size
            return None
        if way == (STREAM_CHANNEL, STREAM_DATA_TOPIC) and size:
            return "a part of no message"
        if channel == STREAM_CHANNEL or way in _SMALL_ONES:  # acknowledgements and errors, too
            return None if size <= SMALL else f"{size} bytes, {SMALL} at most"
        return "no way out of this site"

    def _stays(self, message: Message) -> bool:
        to = message.get_header(MessageHeaderKey.DESTINATION) or ""
        return to in (self._own, FQCN.get_parent(self._own))


class Result:
    """While it lasts one result may be sent; its tensors are fetched then or later."""

    def __init__(self, gate: WireGate, size: int) -> None:
        self._gate, self._size = gate, size

    def __enter__(self) -> None:
        with self._gate._lock:
            self._gate._results += 1
            self._gate._left += _TIMES_FETCHED * self._size + (1 << 20)

    def __exit__(self, *_: object) -> None:
        with self._gate._lock:
            self._gate._results -= 1


def _way(message: Message) -> tuple[str, str]:
    """Channel and topic of the message that a frame belongs to."""
    channel = message.get_header(MessageHeaderKey.CHANNEL) or ""
    topic = message.get_header(MessageHeaderKey.TOPIC) or ""
    if channel == STREAM_CHANNEL:
        channel = message.get_header(StreamHeaderKey.CHANNEL) or channel
        topic = message.get_header(StreamHeaderKey.TOPIC) or topic
    return str(channel), str(topic)


def _size(payload: Any) -> int:
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return memoryview(payload).nbytes
    if isinstance(payload, (list, tuple)):
        return sum(_size(part) for part in payload)
    return SMALL + 1  # of no known size, so too large
