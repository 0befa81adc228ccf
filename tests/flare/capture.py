"""The reader of the wire: a site's component that writes down what its cell really sends.

It sits below every filter, gate and stream of FLARE: `CoreCell._send_to_endpoint` hands the bytes
to the driver right after it. The chunks of a stream are put together again, decoded by FOBS, and
each message becomes one line of JSON in `FOLDER/wire_<process>.jsonl`: who sends what on which
channel, which headers, which tensors by name, and every text that is in it. Named in a site's
`local/privacy.json` it reads the job's process, in `local/resources.json` the site's own as well.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import Encoding, MessageHeaderKey
from nvflare.fuel.f3.cellnet.utils import encode_payload
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import StreamDataType, StreamHeaderKey
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import FOBSContextKey
from nvflare.private.admin_defs import Message as AdminMessage
from nvflare.widgets.widget import Widget

import flap_nvflare.flare  # noqa: F401  registers the decomposer of tensors

PLAIN = (str, int, float, bool, type(None))
_TENSORS = ("Tensor", "LazyDownloadRef")
_KEPT = 400  # characters of a text


class WireCapture(Widget):
    """Starts the reading in this process, once.

    Args:
        folder: where the lines go.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        _Reader.start(Path(folder))


class _Reader:
    _started = False

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"wire_{os.getpid()}.jsonl"
        self._streams: dict[str, bytearray] = {}
        self._lock = threading.Lock()

    @classmethod
    def start(cls, folder: Path) -> None:
        if cls._started:
            return
        cls._started = True
        reader, send = cls(folder), CoreCell._send_to_endpoint

        def send_and_tell(cell: CoreCell, to_endpoint: Any, message: Message) -> str:
            encode_payload(message, fobs_ctx=cell.get_fobs_context())  # as `send` does first
            payload = _bytes(message.payload)
            error = send(cell, to_endpoint, message)
            reader.see(message.headers, payload, to_endpoint.name, error)
            return error

        CoreCell._send_to_endpoint = send_and_tell

    def see(self, headers: Mapping[str, Any], payload: bytes | None, to: str, error: str) -> None:
        with self._lock:
            stream = headers.get(StreamHeaderKey.STREAM_ID)
            kind = headers.get(StreamHeaderKey.DATA_TYPE)
            if stream is None or kind not in (StreamDataType.CHUNK, StreamDataType.FINAL):
                key = MessageHeaderKey.PAYLOAD_ENCODING
                return self._tell(headers, payload, headers.get(key), to, error)
            buffer = self._streams.setdefault(str(stream), bytearray())
            buffer += payload or b""
            if kind == StreamDataType.FINAL:
                key = StreamHeaderKey.PAYLOAD_ENCODING
                whole = bytes(self._streams.pop(str(stream)))
                self._tell(headers, whole, headers.get(key), to, error)
            return None

    def _tell(
        self, headers: Mapping[str, Any], payload: bytes | None, encoding: Any, to: str, error: str
    ) -> None:
        content: Any = payload
        if encoding == Encoding.FOBS and payload:
            try:
                # Tensors that the server fetches later stay references, with their names.
                content = fobs.loads(payload, fobs_ctx={FOBSContextKey.PASS_THROUGH: True})
            except Exception as fault:  # what can't be read is written down as that
                content = f"UNREADABLE {type(fault).__name__}: {fault}"
        channel = headers.get(StreamHeaderKey.CHANNEL) or headers.get(MessageHeaderKey.CHANNEL)
        topic = headers.get(StreamHeaderKey.TOPIC) or headers.get(MessageHeaderKey.TOPIC)
        line = {
            "channel": channel,
            "topic": topic,
            "kind": headers.get(MessageHeaderKey.MSG_TYPE),
            "to": to,
            "error": error,
            "bytes": len(payload or b""),
            "cell_headers": sorted(headers),
            "headers": _plain(getattr(content, "get", lambda *_: None)("__headers__", {})),
            "tensors": sorted(set(_tensors(content))),
            "texts": sorted({text[:_KEPT] for text in _texts(content)}),
            "bytes_parts": [len(part) for part in _parts(content)],
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """All that was sent by the processes that wrote to the folder."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("wire_*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def _bytes(payload: Any) -> bytes | None:
    if payload is None or isinstance(payload, (bytes, bytearray, memoryview)):
        return None if payload is None else bytes(payload)
    return b"".join(bytes(part) for part in payload)  # FOBS gives a list of buffers


def _walk(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    yield name, value
    if depth > 12:
        return
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f"{name}", str(key)
            yield from _walk(part, str(key), depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from _walk(part, name, depth + 1)
    elif isinstance(value, FLContext):
        yield from _walk(value.props, name, depth + 1)
    elif isinstance(value, AdminMessage):
        yield from _walk(vars(value), name, depth + 1)


def _tensors(content: Any) -> Iterator[str]:
    return (name for name, value in _walk(content) if type(value).__name__ in _TENSORS)


def _texts(content: Any) -> Iterator[str]:
    return (value for _, value in _walk(content) if isinstance(value, str))


def _parts(content: Any) -> Iterator[bytes]:
    return (value for _, value in _walk(content) if isinstance(value, (bytes, bytearray)))


def _plain(headers: Any) -> dict[str, Any]:
    if not isinstance(headers, Mapping):
        return {}
    return {
        str(key): value if isinstance(value, PLAIN) else type(value).__name__
        for key, value in headers.items()
    }
