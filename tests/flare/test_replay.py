"""Messages sent again, twice, or in another's name; and what of a peer's text is kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import ServerContext
from hostile_updates import HOSTILE, SITES, Draft, Server, honest, right, tensors
from nvflare.apis.client import Client
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from flap_nvflare.adapter.links import Uplink
from flap_nvflare.flare import messages
from flap_nvflare.flare.coding import DecodeUpdate
from flap_nvflare.flare.controller import FlapController


def reasons(server: Server) -> list[str]:
    return [refusal.reason for refusal in server.job.refused]


@pytest.mark.parametrize("kind", ["plain", "scaffold"])
def test_an_update_of_an_old_round_does_not_count(kind: str, tmp_path: Path) -> None:
    server, old = Server(kind, tmp_path), right(kind, HOSTILE)
    old.meta[messages.ROUND] = 0
    assert not server.accept(HOSTILE, old.message())
    assert reasons(server) == ["round 0, expected 1"]


def test_a_coded_update_of_an_old_round_does_not_count_under_a_new_number(tmp_path: Path) -> None:
    blob, _ = Uplink(("difference", "top_k=0.5", "int4", "deflate")).send(
        tensors(5), tensors(1), False
    )
    server, old = Server("coded", tmp_path), right("coded", HOSTILE)
    old.data = {messages.CODED: blob}  # a difference to the adapter of another round
    assert not server.accept(HOSTILE, old.message())
    assert "is a difference to" in reasons(server)[0]


@pytest.mark.parametrize("kind", ["plain", "coded"])
def test_only_the_first_answer_of_a_site_counts(kind: str, tmp_path: Path) -> None:
    server = Server(kind, tmp_path)
    for site in SITES:
        assert server.accept(site, right(kind, site).message())
        other = right(kind, HOSTILE)  # as if from this site
        for again in (right(kind, site), other):
            assert not server.accept(site, again.message())
    assert set(reasons(server)) == {"a second answer in the same round"}
    expected, found = honest(kind), server.aggregate()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["plain", "coded"])
def test_a_site_counts_under_the_name_that_was_verified(kind: str, tmp_path: Path) -> None:
    server = Server(kind, tmp_path)

    def by_name(site: str, draft: Draft, claims: str) -> bool:
        context = ServerContext(server.job, 1).peer("nobody", claims=claims)
        context.set_prop(messages.SENDER, site, private=True, sticky=False)
        return server.aggregator.accept(DecodeUpdate().process(draft.message(), context), context)

    first = SITES[0]
    assert by_name(HOSTILE, right(kind, HOSTILE), claims=first)
    assert not by_name(HOSTILE, right(kind, HOSTILE), claims=first)  # in another's name once more
    assert by_name(first, right(kind, first), claims=first)
    assert sorted(server.job.reports) == sorted([first, HOSTILE])
    assert not by_name("nobody", right(kind, SITES[1]), claims=SITES[1])
    assert [refusal.site for refusal in server.job.refused] == [HOSTILE, "nobody"]


def test_the_controller_tells_the_aggregator_the_name_that_flare_verified(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

    seen: list[Any] = []
    monkeypatch.setattr(
        ScatterAndGather,
        "_accept_train_result",
        lambda self, client, result, fl_ctx, unknown: (
            seen.append(fl_ctx.get_prop(messages.SENDER)) or True
        ),
    )
    context = ServerContext(Server("plain", tmp_path).job, 1).peer("", claims="A")
    FlapController()._accept_train_result("F", Shareable(), context)
    assert seen == ["F"]


LONG = "x\nERROR forged\x1b[31m\u202e" * 5000


def test_what_a_peer_writes_into_log_and_rounds_is_short_and_printable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server("plain", tmp_path)

    def field(name: str, value: Any) -> Draft:
        draft = right("plain", HOSTILE)
        draft.meta[name] = value
        return draft

    spec = right("plain", HOSTILE).meta[messages.SPEC]
    named = right("plain", HOSTILE)
    named.data[LONG] = torch.ones(2)
    kinds = right("plain", HOSTILE)
    kinds.dxo_kind = LONG
    drafts = [
        named, kinds, field(messages.ROUND, LONG), field(messages.WEIGHT, LONG),
        field(messages.REPORT, LONG), field(messages.REPORT, {"steps": LONG}),
        field(messages.REPORT, {"steps": 3, "dice": {LONG: 1.0}}), field(messages.SPEC, LONG),
        *(field(messages.SPEC, {**spec, name: LONG}) for name in spec),
        field(messages.SPEC, {**spec, "shapes": {LONG: [LONG]}}),
    ]  # fmt: skip
    with caplog.at_level(logging.INFO):
        for draft in drafts:
            assert not server.accept(HOSTILE, draft.message())
    lines = [r.getMessage() for r in caplog.records if "REFUSED" in r.getMessage()]
    assert len(lines) == len(drafts)
    for line in lines:
        assert line.isprintable()
        assert len(line) < 700
    line = server.job.round_line(1)
    assert len(json.dumps(line)) < 10_000
    texts = [one[field] for one in line["refused"] for field in ("site", "key", "reason")]
    assert all(text.isprintable() and len(text) <= 250 for text in texts)


def test_a_flood_of_answers_leaves_a_bounded_line(tmp_path: Path) -> None:
    server = Server("plain", tmp_path)
    spoilt = right("plain", HOSTILE)
    spoilt.meta[messages.WEIGHT] = -1.0
    for _ in range(200):
        assert not server.accept(HOSTILE, spoilt.message())
    late = right("plain", SITES[0])
    late.meta[messages.ROUND] = 0
    assert not server.accept(SITES[0], late.message())
    refused = [refusal.site for refusal in server.job.refused]
    assert refused.count(HOSTILE) == 16
    assert refused.count(SITES[0]) == 1
    assert server.accept(HOSTILE, right("plain", HOSTILE).message())


def test_extra_figures_of_a_report_are_not_kept(tmp_path: Path) -> None:
    server, draft = Server("plain", tmp_path), right("plain", HOSTILE)
    draft.meta[messages.REPORT] |= {LONG: LONG, "case": "case_00007", "path": "/data/secret"}
    draft.meta["more"] = {"case": "case_00007"}
    assert server.accept(HOSTILE, draft.message())
    written = json.dumps(server.job.round_line(1))
    assert len(written) < 2000
    assert "case_00007" not in written
    assert "secret" not in written


def test_what_a_site_says_instead_of_scores_is_short_and_printable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controller = FlapController()
    controller._job = Server("plain", tmp_path).job
    controller._models = ("last",)
    context = ServerContext(controller.job, 1)
    figures = {"case": LONG, "dice": [0.5, 0.5], "dice_paper": [0.5, 0.5]}
    score = {
        "site": LONG, "split": LONG, "class_names": ["kidney", "tumour"], "cases": [figures] * 3,
    }  # fmt: skip
    bad = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    bad.set_return_code(LONG)
    replies = {
        "A": DXO(DataKind.METRICS, {"last": {"test": score}}).to_shareable(),
        "B": DXO(DataKind.METRICS, {"last": {"test": {**score, "cases": [figures] * 10_001}}}),
        "C": DXO(DataKind.METRICS, {"last": {"test": {**score, "class_names": [LONG]}}}),
        "D": DXO(LONG, {"last": 1}),
        "E": bad,
    }
    for site, reply in replies.items():
        task = _ClientTask(site, reply.to_shareable() if isinstance(reply, DXO) else reply)
        controller._receive_scores(task, context)  # type: ignore[arg-type]
    assert list(controller._scores) == ["A"]
    kept = controller._scores["A"]["last"]["test"]
    assert [case["case"] for case in kept["cases"]] == ["1", "2", "3"]
    assert (kept["site"], kept["split"]) == ("A", "test")
    assert "forged" not in json.dumps(controller._scores)
    lines = [r.getMessage() for r in caplog.records if "site " in r.getMessage()]
    assert len(lines) == 4
    assert all(line.isprintable() and len(line) < 500 for line in lines)


class _ClientTask:
    def __init__(self, site: str, result: Shareable) -> None:
        self.client, self.result = Client(site, ""), result
