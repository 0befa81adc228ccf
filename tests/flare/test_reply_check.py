"""A whole reply against its task: what a site's own round makes passes, anything more does not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import SiteContext
from hypothesis import given
from hypothesis import strategies as some
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from wire import CODED, Wire, over_the_wire

from flap_nvflare.adapter.cipher import SEALED
from flap_nvflare.adapter.codec import encode
from flap_nvflare.adapter.factors import of_rank
from flap_nvflare.adapter.stages import parse
from flap_nvflare.flare import messages
from flap_nvflare.flare.asked import Asked, shapes_up
from flap_nvflare.flare.encryption import EncryptUpdate
from flap_nvflare.flare.header_check import bare_error
from flap_nvflare.flare.messages import REASON
from flap_nvflare.flare.reply_check import check_reply
from flap_nvflare.rules_table import rows
from flap_nvflare.settings import METHODS, Federation
from flap_nvflare.training.scores import CaseScore, SiteScore

MB = 64.0
NAMES = ("kidney", "tumour")


def asked_by(task: Shareable, name: str, federation: Federation, **more: Any) -> Asked:
    headers = dict(task["__headers__"])
    headers["__cookie_jar__"] = {"__task_id__": "t1"}
    return Asked(
        task=name,
        task_id="t1",
        federation=federation,
        run="fed_kits/1",
        round_index=0,
        headers=headers,
        site=("A",),
        shapes=shapes_up(federation, federation.rank_of("A")),
        **more,
    )


def finished(reply: Shareable, name: str) -> Shareable:
    """The headers that FLARE adds."""
    reply.set_header("__task_name__", name)
    reply.set_header("__task_id__", "t1")
    reply.set_header("__cookie_jar__", {"__task_id__": "t1"})
    reply.set_header("__audit_event_id__", "0c6f8a3e-6a0c-4f6f-9a77-4d5b6f0f3d11")
    return reply


class Round:
    """A site's reply to a train task, and the task."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.wire = Wire(folder, **settings)
        task = self.wire.received("A")
        held = of_rank(self.wire.job.state.tensors, self.wire.federation.rank_of("A"))
        update = {name: held[name] + 0.01 for name in self.wire.job.expected("A", 0).shapes}
        self.reply = finished(
            self.wire.sent_up("A", self.wire.reply("A", task, update)), messages.TRAIN
        )
        self.asked = asked_by(task, messages.TRAIN, self.wire.federation)

    def fault(self, most: float = MB) -> str:
        """Why the reply may not leave; empty if it may."""
        try:
            check_reply(self.reply, self.asked, most)
        except ContentBlockedException as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Round:
    return Round(tmp_path_factory.mktemp("round"))


def copied(reply: Shareable) -> Shareable:
    found = Shareable()
    found.update(copy.deepcopy(dict(reply)))
    return found


@pytest.fixture
def plain(template: Round) -> Round:
    found = copy.copy(template)
    found.reply = copied(template.reply)
    return found


def test_what_a_round_makes_passes(plain: Round) -> None:
    assert plain.fault() == ""


@pytest.mark.parametrize("rule", [row.name for row in rows()])
def test_the_update_of_every_rule_passes(tmp_path: Path, rule: str) -> None:
    found = Round(tmp_path, rule=rule)
    assert found.fault() == ""
    assert set(found.reply["DXO"]["data"]) <= set(found.asked.shapes)


@pytest.mark.parametrize("method", METHODS)
def test_the_update_of_every_method_passes(tmp_path: Path, method: str) -> None:
    assert Round(tmp_path, method=method, rule="mean").fault() == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "scaffold", "rule": "mean"},
        {"personal": "head"},
        {"personal": "ditto"},
        {"site_ranks": {"A": 1}, "rule": "ranked"},
        {"lora_blocks": 1},
    ],
    ids=str,
)
def test_the_update_of_other_settings_passes(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert Round(tmp_path, **settings).fault() == ""


def test_coded_bytes_pass(tmp_path: Path) -> None:
    coded = Round(tmp_path, **CODED)
    assert messages.CODED in coded.reply["DXO"]["data"]
    assert coded.fault() == ""


def test_a_control_variate_passes_with_scaffold_alone(plain: Round) -> None:
    data = plain.reply["DXO"]["data"]
    name = min(data)
    data[f"control/{name}"] = torch.zeros_like(data[name])
    assert "scaffold" in plain.fault()
    federation = dataclasses.replace(plain.asked.federation, optimizer="scaffold", rule="mean")
    plain.asked = dataclasses.replace(plain.asked, federation=federation)
    assert plain.fault() == ""


def test_every_method_has_its_own_shapes() -> None:
    found = {
        method: shapes_up(Federation(method=method, rule="mean", image_size=32, rank=2), 2)
        for method in ("lora", "flap", "partial_decoder", "full")
    }
    assert set(found["lora"]) < set(found["flap"])
    assert set(found["partial_decoder"]) < set(found["flap"])
    assert not set(found["full"]) & set(found["lora"])


def test_what_a_site_keeps_to_itself_may_not_leave(plain: Round) -> None:
    federation = dataclasses.replace(plain.asked.federation, personal="head")
    shapes = shapes_up(federation, federation.rank)
    plain.asked = dataclasses.replace(plain.asked, federation=federation, shapes=shapes)
    assert "mask_decoder" in plain.fault()


Change = Callable[[Shareable], None]
TENSOR = "image_encoder.blocks.0.attn.qkv.q.lora_a"


def meta(reply: Shareable) -> dict[str, Any]:
    return reply["DXO"]["meta"]


def first(reply: Shareable) -> str:
    return min(reply["DXO"]["data"])


def larger(reply: Shareable) -> None:
    """A tensor of the right shape and values, with more memory behind it."""
    data, name = reply["DXO"]["data"], first(reply)
    shape = data[name].shape
    data[name] = torch.zeros(1000)[: data[name].numel()].view(shape)


HOSTILE: dict[str, Change] = {
    "another tensor": lambda r: r["DXO"]["data"].update(scan=torch.ones(2, 2)),
    "frozen weight": lambda r: r["DXO"]["data"].update(
        {"image_encoder.pos_embed": torch.ones(1, 2, 2, 8)}
    ),
    "name of the right form": lambda r: r["DXO"]["data"].update(
        {"image_encoder.blocks.99.attn.qkv.q.lora_a": torch.ones(2, 8)}
    ),
    "another shape": lambda r: r["DXO"]["data"].update({first(r): torch.ones(512, 512)}),
    "another dtype": lambda r: r["DXO"]["data"].update(
        {first(r): r["DXO"]["data"][first(r)].double()}
    ),
    "memory behind a view": larger,
    "sparse tensor": lambda r: r["DXO"]["data"].update(
        {first(r): r["DXO"]["data"][first(r)].to_sparse()}
    ),
    "bytes": lambda r: r["DXO"]["data"].update(extra=b"scan"),
    "coded bytes that nobody asked for": lambda r: r["DXO"]["data"].update(
        {messages.CODED: encode({first(r): torch.ones(2)}, parse(["deflate"]))}
    ),
    "sealed bytes that nobody asked for": lambda r: r["DXO"].update(
        data={name: torch.ones(8, dtype=torch.uint8) for name in SEALED}
    ),
    "field of the reply": lambda r: r.update(scan="case_1"),
    "field of the DXO": lambda r: r["DXO"].update(scan="case_1"),
    "kind": lambda r: r["DXO"].update(kind=DataKind.WEIGHT_DIFF),
    "collection": lambda r: r["DXO"].update(
        kind=DataKind.COLLECTION, data={"a": DXO(DataKind.WEIGHTS, data={TENSOR: torch.ones(2)})}
    ),
    "header": lambda r: r.set_header("case", "case_1"),
    "header of FLARE": lambda r: r.set_header("__peer_props__", {"case": "case_1"}),
    "header's bytes": lambda r: r.set_header("__msg_root_id__", b"case_1"),
    "header's long text": lambda r: r.set_header("__audit_event_id__", "f" * 65),
    "header's text": lambda r: r.set_header("__audit_event_id__", "case 1"),
    "cookie": lambda r: r.set_header("__cookie_jar__", {"__task_id__": "t1", "c": "case_1"}),
    "task's name": lambda r: r.set_header("__task_name__", "case_1"),
    "content type": lambda r: r.set_header("__content_type__", "case_1"),
    "settings": lambda r: r.set_header(messages.FEDERATION, {"class_names": ["case_1"]}),
    "run": lambda r: r.set_header(messages.RUN, "case_1/1"),
    "turned": lambda r: r.set_header(messages.TURNED, 1),
    "reason with a text": lambda r: r.set_header(REASON, {"code": "case_1"}),
    "return code": lambda r: r.set_header("__rc__", "case_1"),
    "meta": lambda r: meta(r).update(case="case_1"),
    "meta's list": lambda r: meta(r).update(flap_pixels=list(range(10_000))),
    "report's field": lambda r: meta(r)[messages.REPORT].update(worst="case_1"),
    "report's text": lambda r: meta(r)[messages.REPORT].update(steps="case_1"),
    "report's class": lambda r: meta(r)[messages.REPORT].update(dice={"case_1": 0.5}),
    "report's list": lambda r: meta(r)[messages.REPORT].update(loss=[0.0] * 10_000),
    "report's unit": lambda r: meta(r)[messages.REPORT].update(
        privacy={"secret": True, "unit": "case_1"}
    ),
    "weight": lambda r: meta(r).update({messages.WEIGHT: "case_1"}),
    "weight that is none": lambda r: meta(r).update({messages.WEIGHT: float("nan")}),
    "round": lambda r: meta(r).update({messages.ROUND: 7}),
    "spec's method": lambda r: meta(r)[messages.SPEC].update(method="case_1"),
    "spec's base": lambda r: meta(r)[messages.SPEC].update(base_sha256="case_1"),
    "spec's shape": lambda r: meta(r)[messages.SPEC]["shapes"].update({first(r): [1, 2, 3]}),
    "spec's name": lambda r: meta(r)[messages.SPEC]["shapes"].update(case_1=[1]),
    "spec's field": lambda r: meta(r)[messages.SPEC].update(case="case_1"),
    "spec": lambda r: meta(r).update({messages.SPEC: "case_1"}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_anything_more_is_blocked(plain: Round, change: Change) -> None:
    change(plain.reply)
    assert plain.fault()


def test_a_field_of_another_class_is_blocked(plain: Round) -> None:
    class Other(Shareable):
        pass

    other = Other()
    other.update(plain.reply)
    plain.reply = other
    assert "Other" in plain.fault()


def test_an_update_above_the_sites_limit_is_blocked(plain: Round) -> None:
    size = sum(t.numel() * 4 for t in plain.reply["DXO"]["data"].values())
    assert plain.fault(size / 1e6) == ""
    assert "max_update_mb" in plain.fault(size / 1e6 * 0.999)


def test_coded_bytes_of_other_stages_or_larger_than_plain_ones_are_blocked(tmp_path: Path) -> None:
    coded = Round(tmp_path, **CODED)
    data = coded.reply["DXO"]["data"]
    blob, name = data[messages.CODED], min(coded.asked.shapes)
    data[messages.CODED] = encode({name: torch.ones(2)}, parse(["int8"]))
    assert "stages" in coded.fault()
    data[messages.CODED] = blob + bytes(10_000_000)
    assert "coded bytes" in coded.fault()


def test_with_encryption_nothing_plain_leaves(plain: Round) -> None:
    federation = dataclasses.replace(plain.asked.federation, encryption="he")
    plain.asked = dataclasses.replace(plain.asked, federation=federation)
    assert "not sealed" in plain.fault()
    names = {
        "sealed.ciphertext": torch.zeros(2, 1000, dtype=torch.uint8),
        "sealed.weight": torch.zeros(8, dtype=torch.uint8),
    }
    plain.reply["DXO"]["data"] = names
    assert plain.fault() == ""
    names["sealed.ciphertext"] = torch.zeros(500, 100_000, dtype=torch.uint8)
    assert "sealed bytes" in plain.fault()
    names["sealed.ciphertext"] = torch.zeros(2, 1000)
    assert "another form" in plain.fault()


def test_a_private_update_passes_with_its_statement(tmp_path: Path) -> None:
    private = Round(tmp_path, dp_clip=0.5, dp_noise=0.5)
    assert private.reply["DXO"]["meta"][messages.REPORT]["privacy"]["releases"] == 1
    assert private.fault() == ""
    del private.reply["DXO"]["meta"][messages.REPORT]["privacy"]
    assert "private" in private.fault()


def test_a_sealed_update_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tenseal")
    monkeypatch.setenv("FLAP_HOME", str(tmp_path / "home"))
    sealed = Round(tmp_path, encryption="he", rule="mean")
    (tmp_path / "simulated").mkdir()
    context = SiteContext(tmp_path / "simulated", simulated=True)
    sealed.reply = over_the_wire(EncryptUpdate("he").process(sealed.reply, context))
    assert set(sealed.reply["DXO"]["data"]) == SEALED
    assert sealed.fault() == ""
    assert "limits.max_update_mb" in sealed.fault(1e-6)


def test_without_noise_nothing_leaves_where_noise_was_asked_for(plain: Round) -> None:
    federation = dataclasses.replace(plain.asked.federation, dp_clip=1.0, dp_noise=1.0)
    plain.asked = dataclasses.replace(plain.asked, federation=federation)
    assert "private" in plain.fault()


def test_a_task_without_settings_gets_no_data(plain: Round) -> None:
    plain.asked = dataclasses.replace(plain.asked, federation=None)
    assert "no settings" in plain.fault()


# ---- scores --------------------------------------------------------------------------------
def score(**changes: Any) -> SiteScore:
    case = CaseScore("1", (0.5, None), (0.5, 1.0))
    return dataclasses.replace(SiteScore("A", "test", NAMES, (case,), 1.5), **changes)


def scored(value: dict[str, Any]) -> tuple[Shareable, Asked]:
    reply = DXO(DataKind.METRICS, data={"last": {"test": value}}).to_shareable()
    federation = Federation(class_names=NAMES)
    asked = asked_by(Shareable(), messages.VALIDATE, federation, models=("last", "best"))
    return finished(reply, messages.VALIDATE), dataclasses.replace(asked, round_index=-1)


def test_scores_of_numbered_cases_pass() -> None:
    check_reply(*scored(score().to_dict()), MB)
    check_reply(*(over_the_wire(scored(score().to_dict())[0]), scored({})[1]), MB)


@pytest.mark.parametrize(
    "value",
    [
        score(cases=(CaseScore("case_1", (0.5, None), (0.5, 1.0)),)).to_dict(),
        score(site="case_1").to_dict(),
        score(split="case_1").to_dict(),
        score(class_names=("case_1", "tumour")).to_dict(),
        {**score().to_dict(), "note": "case_1"},
        {**score().to_dict(), "seconds": "case_1"},
        {**score().to_dict(), "dice": {"kidney": 0.25}},
        score(cases=(CaseScore("1", (0.5, 0.5), (0.5, 0.5), nsd=(0.5, 0.5)),)).to_dict(),
        score(cases=(CaseScore("1", (0.5, 0.5), (0.5, 0.5), dice_flamby=(0.5, 0.5)),)).to_dict(),
        {},
    ],
)
def test_scores_with_anything_more_are_blocked(value: dict[str, Any]) -> None:
    with pytest.raises(ContentBlockedException):
        check_reply(*scored(value), MB)


def test_scores_of_another_model_are_blocked() -> None:
    reply, asked = scored(score().to_dict())
    reply["DXO"]["data"]["case_1"] = {"test": score().to_dict()}
    with pytest.raises(ContentBlockedException, match="other models"):
        check_reply(reply, asked, MB)


def test_weights_do_not_answer_a_task_that_asks_for_scores(plain: Round) -> None:
    plain.asked = dataclasses.replace(plain.asked, task=messages.VALIDATE)
    plain.reply.set_header("__task_name__", messages.VALIDATE)
    assert "kind" in plain.fault()


# ---- errors --------------------------------------------------------------------------------
def test_an_error_reply_keeps_its_code_and_its_reason_alone(plain: Round) -> None:
    reason = {"code": "too_few_cases", "numbers": {"cases": 1, "min_cases": 5}}
    reply = finished(make_reply(ReturnCode.EXECUTION_EXCEPTION), messages.TRAIN)
    reply.set_header(REASON, reason)
    reply.set_header("case", "case_1")
    reply.set_header(messages.FEDERATION, {})
    assert bare_error(reply, plain.asked) == {
        "__rc__": ReturnCode.EXECUTION_EXCEPTION,
        "__task_name__": "train",
        "__task_id__": "t1",
        "__cookie_jar__": {"__task_id__": "t1"},
        "__audit_event_id__": "0c6f8a3e-6a0c-4f6f-9a77-4d5b6f0f3d11",
        REASON: reason,
    }


@pytest.mark.parametrize(
    "reason",
    [
        {"code": "case_1"},
        {"code": "disk_full", "numbers": {"case_1": 1}},
        {"code": "too_few_cases", "numbers": {"cases": "case_1"}},
        {"code": "too_few_cases", "numbers": {"cases": float("inf")}},
        {"code": "disk_full", "text": "case_1"},
        "disk_full",
    ],
)
def test_a_reason_is_a_code_and_its_numbers(plain: Round, reason: object) -> None:
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply.set_header(REASON, reason)
    assert REASON not in bare_error(reply, plain.asked)


def test_a_return_code_is_one_of_flares(plain: Round) -> None:
    reply = make_reply("case_1")
    assert bare_error(reply, plain.asked) == {"__rc__": ReturnCode.EXECUTION_EXCEPTION}
    assert bare_error("no reply", plain.asked, "TIMEOUT") == {"__rc__": "TIMEOUT"}


# ---- whatever is put in --------------------------------------------------------------------
VALUES = some.recursive(
    some.one_of(some.text(min_size=1), some.binary(min_size=1), some.integers(), some.floats()),
    lambda inner: some.one_of(some.lists(inner), some.dictionaries(some.text(), inner)),
    max_leaves=4,
)


@given(value=VALUES, place=some.sampled_from(("reply", "headers", "DXO", "meta", "report", "data")))
def test_a_new_entry_is_blocked_wherever_it_is_and_whatever_it_holds(
    template: Round, value: Any, place: str
) -> None:
    reply = copied(template.reply)
    target = {
        "reply": reply,
        "headers": reply["__headers__"],
        "DXO": reply["DXO"],
        "meta": meta(reply),
        "report": meta(reply)[messages.REPORT],
        "data": reply["DXO"]["data"],
    }[place]
    target["something"] = value
    with pytest.raises(ContentBlockedException):
        check_reply(reply, template.asked, MB)


@given(value=VALUES, at=some.integers(0, 100))
def test_no_value_in_the_place_of_another_brings_a_text_out(
    template: Round, value: Any, at: int
) -> None:
    reply = copied(template.reply)
    headers = reply["__headers__"]
    names = sorted(headers)
    name = names[at % len(names)]
    headers[name] = value
    try:
        check_reply(reply, template.asked, MB)
    except ContentBlockedException:
        return
    # What passes is short, and of the few characters that an id has.
    assert name in ("__audit_event_id__", "__msg_root_id__", "__msg_root_ttl__")
    assert isinstance(value, str)
    assert len(value) <= 64
