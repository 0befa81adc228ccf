"""Reasons of a site's failure: what may be told of it, and what the server makes of that."""

from __future__ import annotations

import errno
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.adapter.update import UpdateError
from flap_nvflare.data.errors import DataError
from flap_nvflare.flare.context import RefusedMessageError
from flap_nvflare.sam.checkpoint import CheckpointError, MissingCheckpointError
from flap_nvflare.settings import MissingDataError, OtherBaseError, SettingsError
from flap_nvflare.site.reasons import REASONS, SiteError, fields, of_exception, sentence
from flap_nvflare.training.errors import StateError, TrainingError

SECRET = "/data/case_00017/imaging.nii.gz"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", SECRET), "disk_full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (PermissionError(errno.EACCES, "Permission denied", SECRET), "file_refused"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (DataError(f"{SECRET}: no such file"), "data_missing"),
        (MissingDataError("no data"), "data_missing"),
        (CheckpointError("damaged"), "weights_other"),
        (MissingCheckpointError("no such file"), "weights_missing"),
        (OtherBaseError("setting checkpoint_sha256"), "weights_other"),
        (SettingsError("setting rank: -1"), "setting_refused"),
        (RefusedMessageError("adapter"), "message_refused"),
        (StateError("moments"), "state_damaged"),
        (UpdateError("adapter"), "state_damaged"),
        (TrainingError("the loss is nan"), "training_failed"),
        (KeyError(SECRET), "unknown"),
        (SiteError("too_few_cases", SECRET, cases=3, min_cases=10), "too_few_cases"),
    ],
)
def test_each_error_has_its_reason_and_tells_no_name(error: Exception, reason: str) -> None:
    found = of_exception(error)
    assert found.reason == reason
    assert SECRET not in json.dumps(found.to_dict())
    assert SECRET not in sentence("A", found.to_dict())


def test_the_error_below_another_gives_the_reason() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", SECRET)
        except OSError as error:
            raise KeyError("no file of moments") from error
    except KeyError as error:
        found = of_exception(error)
    assert found.reason == "disk_full"
    assert "no file of moments" in str(found)


def test_a_sentence_has_the_sites_numbers() -> None:
    error = SiteError("too_few_cases", cases=3, min_cases=10)
    said = "site A has 3 training cases, its own file asks for 10"
    assert sentence("A", error.to_dict()) == said


def test_only_the_numbers_of_the_sentence_leave_the_site() -> None:
    numbers: dict[str, Any] = {"cases": 3, "min_cases": float("nan"), "path": SECRET, "age": 71}
    assert SiteError("too_few_cases", **numbers).to_dict() == {
        "code": "too_few_cases",
        "numbers": {"cases": 3},
    }
    assert SiteError("a new one", SECRET).to_dict() == {"code": "unknown", "numbers": {}}


@pytest.mark.parametrize("reason", REASONS)
def test_every_sentence_can_be_said_without_its_numbers(reason: str) -> None:
    said = sentence("A", {"code": reason})
    assert said.count("?") == len(fields(reason))
    assert said.startswith("site A ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
CODES = st.sampled_from([*REASONS, "{site.__class__}", "x" * 100_000])
SENT = st.fixed_dictionaries(
    {"code": CODES, "numbers": st.dictionaries(st.sampled_from(["cases", "seconds"]), VALUES)}
)


@given(VALUES | SENT)
def test_whatever_a_site_sends_becomes_one_short_line(value: Any) -> None:
    said = sentence("A", value)
    assert len(said) < 160
    plain = re.sub(r"-?[0-9][0-9.e+-]*|\?", "#", said)
    known = {re.sub(r"\{\w+\}", "#", f"site A {text}") for text in REASONS.values()}
    assert plain in {re.sub(r"-?[0-9][0-9.e+-]*|\?", "#", one) for one in known}


def test_a_huge_whole_number_of_a_site_is_left_out() -> None:
    sent = {"code": "too_few_cases", "numbers": {"cases": 10**400}}
    assert "has ? training" in sentence("A", sent)
