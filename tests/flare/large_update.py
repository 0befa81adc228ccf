"""A process that gets one large update at a server and prints what refusing it took.

Printed as JSON: bytes of the message, growth of the process's peak resident memory in bytes, and
the refusal's reason.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from hostile_updates import HOSTILE, NAMES, SPEC, Server, right

from flap_nvflare.flare import messages


def peak() -> int:
    """The largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def spoilt(kind: str, size: int) -> Any:
    """An update of so many bytes; the parts are in memory once, as FLARE hands them over."""
    draft = right("coded" if kind.startswith("coded") else "plain", HOSTILE)
    if kind == "another shape":
        draft.data[NAMES[0]] = torch.ones(size // 4)
    elif kind == "another name":
        draft.data["scan"] = torch.ones(size // 4)
    elif kind == "another dtype":
        draft.data[NAMES[0]] = torch.ones(size // 8, dtype=torch.float64)
    elif kind == "bytes":
        draft.meta[messages.REPORT] = {"steps": b"\1" * size}
    elif kind == "text":
        draft.meta[messages.REPORT] = "a" * size
    elif kind == "coded":
        draft.data = {messages.CODED: draft.data[messages.CODED][:16] + b"\1" * size}
    elif kind == "coded and plain":
        draft.data = {messages.CODED: (100).to_bytes(8, "little") + b" " * size}
    message = messages.weights_dxo({}, SPEC, 1).to_shareable()
    message["DXO"].update(data=draft.data, meta=draft.meta)
    return message


def main(kind: str, size: int) -> None:
    """Warms up with a small one, since imports and torch's first steps take memory as well."""
    server = Server("coded" if kind.startswith("coded") else "plain", Path(mkdtemp()))
    assert not server.accept(HOSTILE, spoilt(kind, 1000))
    message = spoilt(kind, size)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is what is now
    before = peak()
    assert before < 1.5 * size + 10**9
    assert not server.accept(HOSTILE, message)
    grown = peak() - before
    reason = server.job.refused[-1].reason
    count = server.job.ledger.bytes(1, HOSTILE, "up")
    print(json.dumps({"bytes": count, "grown": grown, "reason": reason}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
