"""What a site lets a job ask: the edges of every limit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.settings import METHODS, PROFILES, Federation
from flap_nvflare.site.limits import PLAIN_METHODS, PLAIN_RANGES, Limits
from flap_nvflare.site.reasons import SiteError


def refusal(limits: Limits, **settings: Any) -> tuple[str, str]:
    """Reason and text of the refusal; empty if there is none."""
    try:
        limits.check(Federation(**settings))
    except SiteError as error:
        return error.reason, str(error)
    return "", ""


@pytest.mark.parametrize("profile", PROFILES)
def test_the_demo_and_the_paper_pass_the_plain_limits(profile: str) -> None:
    Limits().check(Federation.of_profile(profile))


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_but_full_are_allowed_without_a_word(method: str) -> None:
    reason, _ = refusal(Limits(), method=method)
    assert reason == ("method_refused" if method == "full" else "")


@pytest.mark.parametrize("name", PLAIN_RANGES)
def test_a_number_above_its_range_is_refused_and_named(name: str) -> None:
    low, high = PLAIN_RANGES[name]
    kind = type(getattr(Federation(), name))
    assert refusal(Limits(), **{name: kind(high)}) == ("", "")
    narrow = Limits(ranges={name: (low, low)})
    reason, text = refusal(narrow, **{name: kind(high)})
    assert reason == "setting_refused"
    assert f"setting {name} is" in text
    assert f"limits.ranges.{name}" in text


@given(low=st.integers(1, 64), width=st.integers(0, 64), rank=st.integers(1, 200))
def test_a_range_holds_its_ends_and_nothing_beyond(low: int, width: int, rank: int) -> None:
    limits = Limits(ranges={"rank": (low, low + width)})
    assert (refusal(limits, rank=rank)[0] == "") == (low <= rank <= low + width)


def test_choices_can_ask_for_encryption() -> None:
    limits = Limits(choices={"encryption": ("he",), "rule": ("mean", "svd")})
    assert refusal(limits)[0] == "setting_refused"
    assert "one of ['he'] (limits.choices.encryption)" in refusal(limits)[1]
    assert refusal(limits, encryption="he", rule="mean") == ("", "")
    assert refusal(limits, encryption="he", rule="krum")[0] == "setting_refused"


@pytest.mark.parametrize(
    ("clip", "noise", "passes"),
    [
        (0.0, 0.0, False),
        (0.0, 2.0, False),
        (1.0, 0.5, True),
        (0.1, 9.0, True),
        (1.01, 0.5, False),
        (1.0, 0.49, False),
    ],
)
def test_a_floor_of_privacy(clip: float, noise: float, passes: bool) -> None:
    limits = Limits(dp_clip=1.0, dp_noise=0.5)
    assert (refusal(limits, dp_clip=clip, dp_noise=noise)[0] == "") == passes
    assert refusal(Limits(), dp_clip=clip, dp_noise=noise) == ("", "")


def test_too_few_cases_are_told_as_two_numbers() -> None:
    Limits(min_cases=5).check_cases(5)
    with pytest.raises(SiteError) as caught:
        Limits(min_cases=5).check_cases(4)
    assert caught.value.reason == "too_few_cases"
    assert caught.value.numbers == {"cases": 4, "min_cases": 5}


def test_an_update_may_be_as_large_as_the_limit_and_no_larger() -> None:
    limits = Limits(max_update_mb=7.5)
    limits.check_update(7_500_000)
    with pytest.raises(SiteError) as caught:
        limits.check_update(7_500_001)
    assert caught.value.reason == "update_too_large"
    assert caught.value.numbers == {"update_mb": 7.500001, "max_update_mb": 7.5}


def test_limits_as_plain_values_make_the_same_limits() -> None:
    limits = Limits(methods=("lora",), choices={"rule": ("svd",)}, dp_clip=1.0)
    values = limits.to_dict()
    again = Limits(
        **{
            **values,
            "methods": tuple(values["methods"]),
            "parameters": tuple(values["parameters"]),
            "ranges": {name: tuple(pair) for name, pair in values["ranges"].items()},
            "choices": {name: tuple(entry) for name, entry in values["choices"].items()},
        }
    )
    assert again == limits
    assert set(values) == {one.name for one in dataclasses.fields(Limits)}
    assert Limits().methods == PLAIN_METHODS


def test_a_site_may_keep_to_its_own_window() -> None:
    limits = Limits(choices={"grey_values": ("site",)})
    assert refusal(limits) == ("", "")
    reason, text = refusal(limits, grey_values="scan")
    assert reason == "setting_refused"
    assert "one of ['site'] (limits.choices.grey_values)" in text
