"""What a failing site says: nothing of a case in its replies, its events and its error log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from canary import CANARY, FAULTS, break_scan, canary_scans
from layout_files import write_prostate, write_table
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from wire import Wire

from flap_nvflare.flare import messages
from flap_nvflare.flare.executor import FlapExecutor


@pytest.fixture
def error_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """FLARE's file of errors, as its log configuration makes it."""
    monkeypatch.setenv("NVFLARE_SECURE_LOGGING", "false")  # is set by what is tested; put back
    path = tmp_path / "error_log.txt"
    handler = logging.FileHandler(path)
    handler.setLevel(logging.ERROR)
    logging.getLogger().addHandler(handler)
    yield path
    logging.getLogger().removeHandler(handler)
    handler.close()


def train(wire: Wire) -> tuple[Shareable, str]:
    """The reply to a train task, and the texts of all events that it fired."""
    context, told = wire.site_contexts["A"], []

    def fire(event_type: str, fl_ctx: FLContext) -> None:
        told.append(str(fl_ctx.get_prop(FLContextKey.EVENT_DATA)))

    context.get_engine().fire_event = fire
    task = wire.received("A")
    reply = FlapExecutor().execute(messages.TRAIN, task, context, Signal())
    return reply, "\n".join(told)


@pytest.mark.parametrize("fault", [*FAULTS, "no state", "no data", "other layout"])
def test_a_failure_tells_no_case(
    tmp_path: Path, error_log: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    wire = Wire(tmp_path)
    data = canary_scans(tmp_path / f"scans_{CANARY}", ("A",))
    state = tmp_path / f"state_{CANARY}"
    if fault == "no state":
        state.write_text("a file in the folder's place")
    elif fault == "no data":
        data = data / "elsewhere"
    elif fault == "other layout":
        data = write_prostate(tmp_path / f"prostate_{CANARY}", {"HK": [38, 40]})
        write_table(data, f"{CANARY},A,train")
    else:
        break_scan(data, 0, fault)
    file = wire.site_contexts["A"].local / "flap_site.yaml"
    file.write_text(f"data_root: {data}\nstate_dir: {state}\n")
    reply, told = train(wire)
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert CANARY in caplog.text  # in the site's own log
    assert CANARY not in str(reply)
    assert CANARY not in told
    text = error_log.read_text()
    assert "failed with" in text
    assert CANARY not in text
    assert str(tmp_path) not in text
