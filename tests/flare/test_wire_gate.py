"""Which frames a job's process may send: every way out by channel, topic and size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import STREAM_CHANNEL, StreamHeaderKey

from flap_nvflare.flare.wire_gate import SMALL, WireGate

FETCH = "download_service__:download_service__download"


class Gate:
    def __init__(self) -> None:
        self.told: list[tuple[str, int, str]] = []
        core = SimpleNamespace(
            get_fqcn=lambda: "A.job1",
            add_outgoing_request_filter=lambda *_: None,
            add_outgoing_reply_filter=lambda *_: None,
            add_incoming_request_filter=lambda *_: None,
        )
        tell = lambda *what: self.told.append(what)  # noqa: E731
        self.gate = WireGate(SimpleNamespace(core_cell=core), tell)

    def passes(self, channel: str, topic: str, payload: Any = b"", to: str = "server.job1") -> bool:
        frame = stream(channel, topic, payload, to)
        return self.gate.outgoing(frame) is None


def stream(channel: str, topic: str, payload: Any, to: str) -> Message:
    """A chunk of a stream, as FLARE sends nearly all of its messages."""
    headers = {
        MessageHeaderKey.CHANNEL: STREAM_CHANNEL,
        MessageHeaderKey.TOPIC: "sm__DATA",
        MessageHeaderKey.DESTINATION: to,
        StreamHeaderKey.CHANNEL: channel,
        StreamHeaderKey.TOPIC: topic,
    }
    return Message(headers, payload)


@pytest.mark.parametrize(
    ("channel", "topic"),
    [
        ("server_command", "get_task"),
        ("aux_communication", "__sync_runner__"),
        ("aux_communication", "__job_heartbeat__"),
        ("aux_communication", "__task_check__"),
        ("download_service__", "download_service__download"),
        ("return_only", "aux_communication:__end_run__"),
    ],
)
def test_what_flare_needs_passes_while_it_is_small(channel: str, topic: str) -> None:
    gate = Gate()
    assert gate.passes(channel, topic, bytes(SMALL))
    assert not gate.passes(channel, topic, bytes(SMALL + 1))
    assert gate.told[0][:2] == (f"{channel}/{topic}", SMALL + 1)


@pytest.mark.parametrize(
    ("channel", "topic"),
    [
        ("aux_communication", "fed.event"),
        ("aux_communication", "ObjectStreamer.Request"),
        ("aux_communication", "__do_task__"),
        ("aux_communication", "analytix"),
        ("return_only", "aux_communication:__do_task__"),
        ("server_command", "anything"),
        ("file_stream", "scan"),
        ("task", "register"),
        ("", ""),
    ],
)
def test_no_other_way_leads_out(channel: str, topic: str) -> None:
    gate = Gate()
    assert not gate.passes(channel, topic, b"x")
    assert gate.told == [(f"{channel or STREAM_CHANNEL}/{topic or 'sm__DATA'}", 1, gate.told[0][2])]


def test_a_result_goes_by_the_last_gate_alone() -> None:
    gate = Gate()
    assert not gate.passes("server_command", "submit_update", b"x")
    with gate.gate.result(10):
        assert gate.passes("server_command", "submit_update", bytes(1 << 21))
    assert not gate.passes("server_command", "submit_update", b"x")


def test_no_more_tensors_are_fetched_than_the_results_had() -> None:
    gate = Gate()
    assert not gate.passes("return_only", FETCH, b"x")
    size = 10 << 20
    with gate.gate.result(size):
        pass
    assert all(gate.passes("return_only", FETCH, bytes(size)) for _ in range(3))  # tried again
    assert not gate.passes("return_only", FETCH, bytes(size))


def test_what_stays_at_the_site_is_not_looked_at() -> None:
    gate = Gate()
    assert gate.passes("admin", "train.notify_job_status", bytes(1 << 20), to="A")
    assert not gate.passes("admin", "train.notify_job_status", b"", to="B")
    assert not gate.passes("admin", "train.notify_job_status", b"", to="AB.job1")
    assert not gate.passes("admin", "train.notify_job_status", b"", to="A.job2")


def test_a_message_of_no_stream_is_judged_by_its_own_channel() -> None:
    gate = Gate()
    headers = {
        MessageHeaderKey.CHANNEL: "cellnet.channel",
        MessageHeaderKey.TOPIC: "bye",
        MessageHeaderKey.DESTINATION: "server",
    }
    assert gate.gate.outgoing(Message(headers, None)) is None
    headers[MessageHeaderKey.TOPIC] = "report"
    assert gate.gate.outgoing(Message(headers, None)) is not None


def test_a_payload_of_unknown_size_is_too_large() -> None:
    assert not Gate().passes("server_command", "get_task", object())


def test_lists_of_buffers_are_added_up() -> None:
    gate = Gate()
    assert gate.passes("server_command", "get_task", [bytes(SMALL - 1), memoryview(b"x")])
    assert not gate.passes("server_command", "get_task", [bytes(SMALL), memoryview(b"x")])


def test_the_server_pushes_no_task() -> None:
    gate = Gate().gate
    assert gate.incoming(stream("aux_communication", "__do_task__", b"", "A.job1")) is not None
    assert gate.incoming(stream("aux_communication", "__end_run__", b"", "A.job1")) is None


def test_a_flood_is_told_a_hundred_times() -> None:
    gate = Gate()
    for _ in range(150):
        assert not gate.passes("aux_communication", "fed.event")
    assert len(gate.told) == 100
