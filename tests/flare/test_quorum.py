"""What answers that do not count mean for a round: named at once, and the end when too many."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.controller_spec import Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.bcast_manager import BcastTaskManager
from nvflare.apis.shareable import Shareable, make_reply
from test_aggregator import HEAD, Server, message

from flap_nvflare.flare import messages
from flap_nvflare.flare.controller import FlapController
from flap_nvflare.flare.restart import AbandonedJobs
from flap_nvflare.site.reasons import SiteError


class Round:
    """A controller in the middle of round 1, with all six sites and a quorum."""

    def __init__(self, folder: Path, quorum: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = Server(folder, quorum)
        self.controller = FlapController()
        self.controller._job = self.server.job
        self.controller.aggregator = self.server.aggregator
        self.controller._current_round = 1
        self.controller._current_failed_clients = set()
        self.task = Task(messages.TRAIN, Shareable())
        self.controller._task = self.task
        BcastTaskManager(self.task, quorum, 600)
        self.ends: list[str] = []
        self.lines: list[str] = []
        for name, into in (("system_panic", self.ends), ("log_error", self.lines)):
            monkeypatch.setattr(
                FLComponent, name, lambda *said, into=into, **_: into.append(_text(said))
            )
        monkeypatch.setattr(FLComponent, "fire_event", lambda *_, **__: None)

    def answer(self, site: str, reply: Shareable) -> bool:
        context = self.server.context.peer(site)
        return self.controller._accept_train_result(site, reply, context)

    @property
    def awaited(self) -> int:
        """Answers, of whatever kind, for which FLARE waits without a time limit of its own."""
        return int(self.task.props["__min_responses"])


def _text(said: tuple[Any, ...]) -> str:
    return next(part for part in said if isinstance(part, str))


def failure(reason: str = "out_of_memory", **numbers: float) -> Shareable:
    return messages.error_reply(
        ReturnCode.EXECUTION_EXCEPTION, SiteError(reason, "/data/case_00007", **numbers)
    )


@pytest.fixture
def four_of_six(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Round:
    return Round(tmp_path / "run", 4, monkeypatch)


def test_a_failed_site_is_named_with_its_reason_and_the_round_goes_on(four_of_six: Round) -> None:
    assert not four_of_six.answer("B", failure("too_few_cases", cases=2, min_cases=5))
    (line,) = four_of_six.lines
    assert line.startswith("round 1: site B has 2 training cases")
    assert "case_00007" not in line
    assert not four_of_six.ends
    assert [(one.site, one.round) for one in four_of_six.server.job.refused] == [("B", 1)]
    assert all(four_of_six.answer(site, message(site)) for site in "ACDE")
    assert set(four_of_six.server.aggregate()) == set(message("A")["DXO"]["data"])
    assert four_of_six.server.job.missing() == ["F"]


def test_answers_that_do_not_count_use_up_nobodys_place(four_of_six: Round) -> None:
    assert four_of_six.awaited == 4
    four_of_six.answer("B", failure())
    assert four_of_six.awaited == 5
    four_of_six.answer("C", message("C", lambda data: data.pop(HEAD)))
    assert four_of_six.awaited == 6
    assert not four_of_six.ends


def test_the_round_ends_as_soon_as_the_quorum_is_out_of_reach(four_of_six: Round) -> None:
    for site in "AB":
        four_of_six.answer(site, failure())
    assert not four_of_six.ends
    four_of_six.answer("C", make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR))
    (end,) = four_of_six.ends
    assert "4 of 6 updates must count (setting min_sites), and 3 are left" in end
    assert "site A ran out of memory; site B ran out of memory; site C" in end


def test_a_second_bad_answer_takes_nothing_from_the_first_good_one(four_of_six: Round) -> None:
    assert four_of_six.answer("A", message("A"))
    for _ in range(5):
        assert not four_of_six.answer("A", message("A"))
    assert not four_of_six.ends
    assert four_of_six.awaited == 4


def test_a_late_answer_to_an_earlier_round_is_no_failure_in_this_one(four_of_six: Round) -> None:
    context = four_of_six.server.context.peer("F")
    for reply in (failure(), message("F", **{messages.ROUND: 0})):
        assert not four_of_six.controller._accept_train_result("F", reply, context, True)
    for site in "AB":
        four_of_six.answer(site, failure())
    assert not four_of_six.ends
    assert four_of_six.awaited == 6
    assert four_of_six.server.job.missing() == ["C", "D", "E", "F"]


def test_error_replies_of_a_flood_are_not_all_kept(four_of_six: Round) -> None:
    for _ in range(100):
        four_of_six.answer("B", failure())
    assert len(four_of_six.server.job.refused) == 16
    assert not four_of_six.ends


def test_a_server_that_starts_closes_the_jobs_of_its_last_process() -> None:
    closed: list[FLContext] = []
    runner = SimpleNamespace(update_unfinished_jobs=closed.append)
    context = SimpleNamespace(get_engine=lambda: SimpleNamespace(job_runner=runner))
    component = AbandonedJobs()
    component.handle_event(EventType.START_RUN, context)
    assert not closed
    component.handle_event(EventType.SYSTEM_BOOTSTRAP, context)
    assert closed == [context]
