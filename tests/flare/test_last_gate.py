"""The gate as FLARE calls it: events, the door, the audit file, and what happens when it fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contexts import SiteContext
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.utils.event import fire_event_to_components
from nvflare.widgets.info_collector import InfoCollector
from nvflare.widgets.widget import Widget
from wire import CODED, Wire, over_the_wire

from flap_nvflare.flare import messages
from flap_nvflare.flare.error_log import BareFormatter, keep_error_log_bare
from flap_nvflare.flare.executor import FlapExecutor
from flap_nvflare.flare.last_gate import LastGate
from flap_nvflare.flare.messages import REASON
from flap_nvflare.site.audit_log import audit_path
from flap_nvflare.site.audit_summary import summary

TENSOR = "image_encoder.blocks.0.attn.qkv.q.lora_a"


class Core:
    """A cell that keeps the filters it is given."""

    def __init__(self) -> None:
        self.outgoing: list[Callable] = []
        self.incoming: list[Callable] = []

    def get_fqcn(self) -> str:
        return "A.job1"

    def add_outgoing_request_filter(self, channel: str, topic: str, cb: Callable) -> None:
        self.outgoing.append(cb)

    def add_outgoing_reply_filter(self, channel: str, topic: str, cb: Callable) -> None:
        pass

    def add_incoming_request_filter(self, channel: str, topic: str, cb: Callable) -> None:
        self.incoming.append(cb)


class Site:
    """A site's job process with a gate: FLARE's order of events around one task."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.wire = Wire(folder, **settings)
        self.kit = folder / "A"
        self.context: SiteContext = self.wire.site_contexts["A"]
        self.engine = self.context.get_engine()
        self.engine.get_workspace().get_root_dir = lambda: str(self.kit)
        self.engine.get_cell = lambda: SimpleNamespace(core_cell=self.core)
        self.core = Core()
        self.sent: list[Shareable] = []
        self.panics: list[str] = []
        self.later: list[Callable[[], object]] = []
        self.engine.send_task_result = self._send
        self.engine.fire_event = self._fire
        self.context.set_prop(ReservedKey.RUN_NUM, "job1", private=False)
        self.gate = LastGate()

    def _send(self, result: Shareable, fl_ctx: FLContext, timeout: float | None = None) -> bool:
        for later in self.later:
            later()
        self.sent.append(over_the_wire(result))
        return True

    def _fire(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.FATAL_SYSTEM_ERROR:
            self.panics.append(str(fl_ctx.get_prop(FLContextKey.EVENT_DATA)))

    def event(self, event_type: str) -> None:
        self.gate.handle_event(event_type, self.context)

    def put(self, key: str, value: object) -> None:
        self.context.set_prop(key, value, private=True, sticky=False)

    def start(self) -> Site:
        self.event(EventType.ABOUT_TO_START_RUN)
        return self

    def takes(self) -> Shareable:
        """A train task comes in, and passes the filters."""
        sent = over_the_wire(self.wire.sent_down("A"))
        sent.set_header("__cookie_jar__", {"__task_id__": "t1"})
        self.put(FLContextKey.TASK_NAME, messages.TRAIN)
        self.put(FLContextKey.TASK_ID, "t1")
        self.put(FLContextKey.TASK_DATA, sent)
        self.event(EventType.BEFORE_TASK_DATA_FILTER)
        task = self.wire.received("A", sent)
        self.put(FLContextKey.TASK_DATA, task)
        self.event(EventType.BEFORE_TASK_EXECUTION)
        return task

    def answers(self, task: Shareable, change: Callable[[Shareable], None] | None = None) -> None:
        """The round's reply, changed by a component of the job after all filters."""
        update = {name: tensor + 0.01 for name, tensor in self.wire.job.state.tensors.items()}
        reply = self.wire.sent_up("A", self.wire.reply("A", task, update))
        if change is not None:
            change(reply)
        self.put(FLContextKey.TASK_RESULT, reply)
        self.event(EventType.AFTER_TASK_RESULT_FILTER)
        self.put(FLContextKey.TASK_RESULT, None)
        self.goes(reply)

    def goes(self, reply: Shareable) -> bool:
        reply.set_header("__task_name__", messages.TRAIN)
        reply.set_header("__task_id__", "t1")
        reply.set_header("__cookie_jar__", {"__task_id__": "t1"})
        return bool(self.engine.send_task_result(reply, self.context, timeout=None))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in audit_path(self.kit).read_bytes().splitlines()]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path).start()


def test_a_rounds_reply_leaves_and_its_line_says_all_of_it(site: Site) -> None:
    site.answers(site.takes())
    (sent,) = site.sent
    came, left = site.lines()
    assert (came["direction"], came["outcome"], came["round"]) == ("in", "accepted", 0)
    assert came["task"] == "train"
    assert came["bytes"] > 0
    assert (left["direction"], left["outcome"]) == ("out", "sent")
    assert left["job"] == "job1"
    assert left["run"] == site.wire.job.run
    data = sent["DXO"]["data"]
    assert [one["name"] for one in left["tensors"]] == sorted(data)
    for one in left["tensors"]:
        tensor = data[one["name"]]
        assert one["shape"] == list(tensor.shape)
        assert one["bytes"] == 4 * tensor.numel()
        assert one["norm"] == pytest.approx(float(tensor.double().norm()))
    assert left["bytes"] == messages.serialised_bytes(sent)
    assert summary(site.kit).intact


def test_coded_bytes_leave_and_are_summed(tmp_path: Path) -> None:
    site = Site(tmp_path, **CODED).start()
    site.answers(site.takes())
    (one,) = site.lines()[-1]["tensors"]
    assert one["name"] == messages.CODED
    assert one["dtype"] == "bytes"
    assert one["bytes"] == len(site.sent[0]["DXO"]["data"][messages.CODED])


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["DXO"]["data"].update(scan=torch.ones(2, 2)),
        lambda r: r.set_header("case", "case_1"),
        lambda r: r.update(scan=b"pixels"),
        lambda r: r["DXO"]["meta"].update(case="case_1"),
        lambda r: r.update(DXO=object()),
    ],
    ids=["tensor", "header", "field", "meta", "object"],
)
def test_what_a_component_adds_after_all_filters_stops_the_reply(
    site: Site, change: Callable[[Shareable], None]
) -> None:
    site.answers(site.takes(), change)
    (sent,) = site.sent
    assert set(sent) == {"__headers__"}
    assert sent.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR
    assert "case_1" not in str(sent)
    _, blocked, left = site.lines()
    assert blocked["outcome"] == "blocked"
    assert blocked["reason"]
    assert left["return_code"] == ReturnCode.TASK_RESULT_FILTER_ERROR
    assert summary(site.kit).jobs[0].blocked == 1


def test_what_is_added_between_the_gate_and_the_door_is_stopped_at_the_door(site: Site) -> None:
    task = site.takes()
    update = {name: tensor + 0.01 for name, tensor in site.wire.job.state.tensors.items()}
    reply = site.wire.sent_up("A", site.wire.reply("A", task, update))
    site.put(FLContextKey.TASK_RESULT, reply)
    site.event(EventType.AFTER_TASK_RESULT_FILTER)
    reply["DXO"]["data"]["scan"] = torch.ones(2, 2)
    site.goes(reply)
    assert set(site.sent[0]) == {"__headers__"}


def test_what_is_added_while_it_is_sent_stays(site: Site) -> None:
    task = site.takes()
    update = {name: tensor + 0.01 for name, tensor in site.wire.job.state.tensors.items()}
    reply = site.wire.sent_up("A", site.wire.reply("A", task, update))
    tensors = reply["DXO"]["data"]
    name = min(tensors)
    site.later = [
        lambda: tensors.update(scan=torch.ones(2, 2)),
        lambda: tensors[name].fill_(7.0),
        lambda: reply.set_header("case", "case_1"),
    ]
    assert site.goes(reply)
    (sent,) = site.sent
    assert "scan" not in sent["DXO"]["data"]
    assert not bool((sent["DXO"]["data"][name] == 7.0).any())
    assert "case_1" not in str(sent)


def test_an_error_reply_without_any_event_is_cut_down_and_told(site: Site) -> None:
    site.takes()
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply["scan"] = "case_1"
    reply.set_header("case", "case_1")
    reply.set_header(REASON, {"code": "disk_full", "numbers": {}})
    site.goes(reply)
    (sent,) = site.sent
    assert "case" not in str(sent)
    assert sent.get_header(REASON) == {"code": "disk_full", "numbers": {}}
    line = site.lines()[-1]
    assert line["return_code"] == ReturnCode.EXECUTION_EXCEPTION
    assert line["reason"] == "disk_full"
    assert summary(site.kit).jobs[0].errors == 1


def test_a_message_that_the_sites_filters_refuse_is_told_as_refused(site: Site) -> None:
    sent = over_the_wire(site.wire.sent_down("A"))
    site.put(FLContextKey.TASK_NAME, messages.TRAIN)
    site.put(FLContextKey.TASK_ID, "t1")
    site.put(FLContextKey.TASK_DATA, sent)
    site.event(EventType.BEFORE_TASK_DATA_FILTER)
    site.goes(make_reply(ReturnCode.TASK_DATA_FILTER_ERROR))
    came, _ = site.lines()
    assert (came["direction"], came["outcome"]) == ("in", "refused")
    assert came["reason"] == ReturnCode.TASK_DATA_FILTER_ERROR


def test_a_message_that_the_executor_refuses_later_is_told_once_more(site: Site) -> None:
    site.takes()
    site.goes(make_reply(ReturnCode.BAD_TASK_DATA))
    site.goes(make_reply(ReturnCode.BAD_TASK_DATA))  # FLARE tries again
    assert [line["outcome"] for line in site.lines()] == ["accepted", "refused", "sent", "sent"]
    (job,) = summary(site.kit).jobs
    assert (job.received, job.refused, job.bytes_in) == (0, 1, site.lines()[0]["bytes"])


def test_without_its_line_in_the_audit_file_nothing_leaves(site: Site) -> None:
    task = site.takes()
    (site.kit / "flap" / "audit.lock").unlink(missing_ok=True)
    audit_path(site.kit).unlink()
    (site.kit / "flap" / "audit.jsonl").mkdir()
    update = {name: tensor + 0.01 for name, tensor in site.wire.job.state.tensors.items()}
    reply = site.wire.sent_up("A", site.wire.reply("A", task, update))
    assert not site.goes(reply)
    assert site.sent == []
    (site.kit / "flap" / "audit.jsonl").rmdir()  # FLARE asks again
    assert site.goes(reply)
    assert len(site.sent) == 1
    assert site.lines()[-1]["outcome"] == "sent"


def test_a_method_that_the_site_does_not_allow_stays(tmp_path: Path) -> None:
    site = Site(tmp_path)
    path = site.context.local / "flap_site.yaml"
    site.start()
    task = site.takes()
    # What the hospital changes while a job runs is in force from then on.
    path.write_text(path.read_text() + "limits: {methods: [lora]}\n")
    site.answers(task)
    assert set(site.sent[0]) == {"__headers__"}
    assert "limits.methods" in site.lines()[1]["reason"]
    # The server's administrator is told in a code.
    assert site.sent[0].get_header(REASON)["code"] == "method_refused"
    assert site.lines()[2]["reason"] == "method_refused"


def test_full_is_not_among_the_methods_that_a_site_allows_by_itself(tmp_path: Path) -> None:
    from flap_nvflare.site.site_file import Limits

    assert "full" not in Limits().methods


def test_a_gate_that_can_not_start_stops_the_job(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (site.context.local / "flap_site.yaml").write_text("limits: 7\n")
    site.start()
    assert len(site.panics) == 1
    assert "last gate" in site.panics[0]
    assert str(tmp_path) not in site.panics[0]


def test_a_gate_that_was_never_opened_lets_nothing_pass(tmp_path: Path) -> None:
    site = Site(tmp_path)
    task = site.takes()
    update = {name: tensor + 0.01 for name, tensor in site.wire.job.state.tensors.items()}
    reply = site.wire.sent_up("A", site.wire.reply("A", task, update))
    site.put(FLContextKey.TASK_RESULT, reply)
    site.event(EventType.AFTER_TASK_RESULT_FILTER)
    assert set(reply) == {"__headers__"}


def test_a_task_without_our_settings_gets_an_answer_without_data(site: Site) -> None:
    site.put(FLContextKey.TASK_NAME, "statistics")
    site.put(FLContextKey.TASK_DATA, Shareable())
    site.event(EventType.BEFORE_TASK_DATA_FILTER)
    site.event(EventType.BEFORE_TASK_EXECUTION)
    reply = Shareable()
    reply["histogram"] = [1, 2, 3]
    site.put(FLContextKey.TASK_RESULT, reply)
    site.event(EventType.AFTER_TASK_RESULT_FILTER)
    assert set(reply) == {"__headers__"}
    assert site.lines()[-1]["outcome"] == "blocked"


def test_a_sites_own_adapter_answers_the_task_that_asks_for_it(site: Site) -> None:
    task = Shareable()
    for name in (messages.FEDERATION, messages.RUN):
        task.set_header(name, site.wire.task().get_header(name))
    site.put(FLContextKey.TASK_NAME, messages.SUBMIT_MODEL)
    site.put(FLContextKey.TASK_DATA, task)
    site.event(EventType.BEFORE_TASK_DATA_FILTER)
    site.event(EventType.BEFORE_TASK_EXECUTION)
    job = site.wire.job
    reply = messages.weights_dxo(
        job.state.tensors, job.spec, site.wire.federation.rounds
    ).to_shareable()
    assert site.engine.send_task_result(reply, site.context)
    assert "DXO" in site.sent[0]
    assert [line["task"] for line in site.lines()] == [messages.SUBMIT_MODEL] * 2


def test_the_context_takes_nothing_along(site: Site) -> None:
    site.context.set_prop("notes", "case_1 " * 400, private=False)
    site.answers(site.takes())
    assert set(site.sent[0]) == {"__headers__"}
    assert "public" in site.lines()[1]["reason"]


# ---- the error log -------------------------------------------------------------------------
def test_the_error_log_has_no_text_but_our_components(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "error_log.txt")
    other = logging.FileHandler(tmp_path / "log.txt")
    root = logging.getLogger()
    for one in (handler, other):
        root.addHandler(one)
    try:
        assert keep_error_log_bare() == 1
        logging.getLogger("ignite.engine").error("failed on %s", "/data/case_1.nii.gz")
        try:
            raise OSError("/data/case_1.nii.gz")
        except OSError:
            logging.getLogger("monai").exception("case_1\nforged line")
        logging.getLogger("flap_nvflare.flare.executor.FlapExecutor").error("failed with OSError")
    finally:
        for one in (handler, other):
            root.removeHandler(one)
            one.close()
    text = (tmp_path / "error_log.txt").read_text()
    assert "case_1" not in text
    assert len(text.splitlines()) == 3
    assert "ignite.engine - ERROR - test_last_gate" in text
    assert "OSError" in text.splitlines()[1]
    assert text.endswith("failed with OSError\n")
    assert (tmp_path / "log.txt").read_text().count("case_1") > 1


def test_what_flare_keeps_for_show_errors_has_no_text_but_our_executors(site: Site) -> None:
    collector = InfoCollector()

    def fire(event_type: str, fl_ctx: FLContext) -> None:
        fire_event_to_components(event_type, [site.gate, collector], fl_ctx)

    site.engine.fire_event = fire
    Widget().log_error(site.context, "failed on case_1")
    Widget().log_warning(site.context, "failed on case_1")
    FlapExecutor().log_error(site.context, "task train failed with OSError")
    found = str(collector.get_errors())
    assert "case_1" not in found
    assert found.count("see the site's own log") == 2
    assert "task train failed with OSError" in found


def test_the_formatter_keeps_one_record_on_one_line() -> None:
    record = logging.makeLogRecord(
        {"name": "flap_nvflare.flare.x", "levelname": "ERROR", "msg": "one\ntwo"}
    )
    assert "\n" not in BareFormatter().format(record)
