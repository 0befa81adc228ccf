from __future__ import annotations

import pytest
from wire_cases import LISTS

from flap_nvflare.adapter.stages import Pipeline, StageError, parse


def test_an_empty_list_changes_nothing() -> None:
    assert parse([]) == Pipeline(False, False, None, "fp32", False)
    assert not parse([]).lossy


def test_every_stage_is_read() -> None:
    texts = ("difference", "feedback", "top_k=0.1", "int4", "deflate")
    assert parse(texts) == Pipeline(True, True, 0.1, "int4", True)


@pytest.mark.parametrize("texts", LISTS, ids=",".join)
def test_a_pipeline_says_its_list(texts: list[str]) -> None:
    assert parse(texts).texts == tuple(texts)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["feedback", "int4"], "feedback without difference"),
        (["feedback", "difference", "int4"], "difference after feedback.*put difference before"),
        (["difference", "int4", "feedback"], "feedback after int4.*stands before it"),
        (["difference", "top_k=0.1", "feedback"], "feedback after top_k=0.1"),
        (["difference", "feedback"], "feedback without a stage that loses anything"),
        (["difference", "feedback", "deflate"], "without a stage that loses anything"),
        (["int8", "int4"], "int8 and int4: a list holds one number format"),
        (["fp16", "sign"], "one number format"),
        (["difference", "int4", "top_k=0.1"], "top_k=0.1 after int4.*before they are rounded"),
        (["deflate", "int4"], "int4 after deflate.*must be last"),
        (["deflate", "difference"], "difference after deflate.*must be last"),
        (["int4", "difference"], "difference after int4.*as they were trained"),
        (["deflate", "deflate"], "one deflate at most"),
        (["difference", "difference"], "one difference at most"),
        (["difference", "top_k=0.1", "top_k=0.2"], "one top_k at most"),
        (["top_k=0.1", "int4"], "would set most of the adapter to zero"),
        (["int3"], "unknown stage 'int3'; expected difference"),
        (["top_k"], "unknown stage"),
        (["number format"], "unknown stage"),
        (["Deflate"], "unknown stage"),
        ([4], "unknown stage 4"),
        ("int4", "expected a list of stages"),
        *[
            (["difference", f"top_k={share}"], "expected a share between 0 and 1")
            for share in ("0", "1", "-0.1", "1.5", "nan", "inf", "", "ten", "0.1 0.2")
        ],
    ],
)
def test_a_list_that_makes_no_sense_is_refused(texts: list[str], reason: str) -> None:
    with pytest.raises(StageError, match=reason):
        parse(texts)


def test_feedback_is_refused_on_the_way_down() -> None:
    parse(["difference", "feedback", "int4"], "up")
    parse(["difference", "int4"], "down")
    with pytest.raises(StageError, match="count what was lost twice"):
        parse(["difference", "feedback", "int4"], "down")


@pytest.mark.parametrize(
    "values",
    [{"top_k": 0.1}, {"feedback": True, "number": "int4"}, {"number": "int5"},
     {"difference": True, "top_k": 1.0}, {"difference": True, "feedback": True}],
)  # fmt: skip
def test_a_pipeline_is_checked_when_made(values: dict[str, object]) -> None:
    with pytest.raises(StageError):
        Pipeline(**values)  # type: ignore[arg-type]


def test_the_share_keeps_at_least_one() -> None:
    pipeline = parse(["difference", "top_k=0.1"])
    assert [pipeline.kept(n) for n in (0, 1, 3, 100, 1000)] == [0, 1, 1, 10, 100]
    assert parse(["int4"]).kept(7) == 7


def test_the_first_message_goes_whole() -> None:
    whole = parse(["difference", "feedback", "top_k=0.1", "int4", "deflate"]).whole
    assert whole.texts == ("deflate",)
    assert parse(["int4", "deflate"]).whole.texts == ("int4", "deflate")
