"""Settings that exclude each other: every refusal names the setting, the reason and the mend."""

from __future__ import annotations

from typing import Any

import pytest
from aggregation_cases import random_sites

from flap_nvflare import aggregation
from flap_nvflare.aggregation import RULES, Round
from flap_nvflare.combinations import (
    ADAPTER_METHODS,
    FROM_PRODUCTS,
    HEAD_METHODS,
    OF_ANY_NETWORK,
    check,
    excluded,
)
from flap_nvflare.sam.tuning import METHODS
from flap_nvflare.settings import PROFILES, Federation, SettingsError

OWN = {"arch": "bundle", "method": "named", "parameters": ("final_conv.*",)}
HE = {"encryption": "he", "rule": "mean", "cross_site": "global"}

# What the message must say, and the settings.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"rule: 'mode' is not known; expected one of .*'median'", {"rule": "mode"}),
    ("method without adapters.*rule: ffa: .*no adapters; ", {"rule": "ffa", "method": "decoder"}),
    ("method without.*rule: alternate", {"rule": "alternate", "method": "full"}),
    ("method without adapters.*rule: core", {"rule": "core", "method": "attention"}),
    ("method without adapters.*rule: share_a", {"rule": "share_a", "method": "partial_decoder"}),
    *(
        (f"arch: bundle.*rule: {rule}.*low-rank factors.*'mean'", {**OWN, "rule": rule})
        for rule in sorted(set(RULES) - set(OF_ANY_NETWORK))
    ),
    ("personal: head with a method without", {**OWN, "rule": "mean", "personal": "head"}),
    ("site_ranks with a method without", {**OWN, "rule": "mean", "site_ranks": {"A": 2}}),
    ("gauge other.*rule: mean.*no basis", {"rule": "mean", "gauge": "paper"}),
    ("gauge other.*rule: ffa.*no basis", {"rule": "ffa", "gauge": "aligned"}),
    ("energy below 1.*rule: svd.*no residual", {"energy": 0.9}),
    ("encryption: he.*rule: svd.*not linear", {"encryption": "he"}),
    ("encryption: he.*rule: median", {"rule": "median", "encryption": "he"}),
    ("encryption: he.*rule: krum", {"rule": "krum", "encryption": "he"}),
    ("site_ranks.*rule: core.*one rank", {"rule": "core", "site_ranks": {"A": 2}}),
    ("site_ranks.*rule: ffa.*one rank", {"rule": "ffa", "site_ranks": {"A": 2}}),
    *(
        ("rule: stack: .*afresh.*choose optimizer: fedavg", {"rule": "stack", **change})
        for change in (
            {"optimizer": "fedavgm"},
            {"optimizer": "fedadam"},
            {"optimizer": "fednova"},
            {"optimizer": "scaffold"},
            {"server_rate": 0.5},
        )
    ),
    ("scaffold.*rule: alternate", {"rule": "alternate", "optimizer": "scaffold"}),
    ("fednova.*rule: median", {"rule": "median", "optimizer": "fednova"}),
    ("fednova.*rule: krum", {"rule": "krum", "optimizer": "fednova"}),
    ("download: difference.*rule: stack", {"rule": "stack", "download": ("difference", "fp16")}),
    ("upload: unknown stage 'zip'; expected difference", {"upload": ("zip",)}),
    ("upload: top_k without difference", {"upload": ("top_k=0.1",)}),
    ("upload: feedback without difference", {"upload": ("feedback", "int4")}),
    ("upload: int4 and int8: a list holds one number format", {"upload": ("int4", "int8")}),
    ("upload: int8 after deflate", {"upload": ("deflate", "int8")}),
    (r"upload: top_k=2: expected a share", {"upload": ("difference", "top_k=2")}),
    ("download: feedback on the way down", {"download": ("difference", "feedback", "int8")}),
    ("download: unknown stage 8", {"download": (8,)}),
    ("ditto.*rule: share_a", {"rule": "share_a", "personal": "ditto"}),
    (
        "site_ranks with a method without adapters: .*no rank",
        {"rule": "median", "site_ranks": {"A": 2}, "method": "decoder"},
    ),
    ("proximal_on: products.*no products", {"proximal_on": "products", "method": "decoder"}),
    ("gauge other than balanced with a method", {"gauge": "paper", "method": "full"}),
    (
        "site_ranks with gauge: aligned",
        {"rule": "median", "site_ranks": {"A": 2}, "gauge": "aligned"},
    ),
    (
        "site_ranks with optimizer: scaffold",
        {"rule": "svd", "site_ranks": {"A": 2}, "optimizer": "scaffold"},
    ),
    ("he with upload", {**HE, "upload": ("difference", "int8")}),
    ("he with upload", {**HE, "download": ("fp16",)}),
    ("he with optimizer", {**HE, "optimizer": "fedadam"}),
    ("he with optimizer", {**HE, "server_rate": 0.5}),
    ("he with cross_site: all", {**HE, "cross_site": "all"}),
    ("he with site_ranks", {**HE, "site_ranks": {"A": 2}}),
    ("encryption: he.*rule: alternate", {**HE, "rule": "alternate"}),
    ("personal: ditto with proximal_on: factors", {"personal": "ditto"}),
    ("optimizer: scaffold.*rule: krum.*no bound", {"rule": "krum", "optimizer": "scaffold"}),
    ("optimizer: fedavgm.*rule: residual", {"rule": "residual", "optimizer": "fedavgm"}),
    ("server_rate other than 1.*rule: tail", {"rule": "tail", "server_rate": 0.5}),
    ("optimizer: fednova.*rule: tail", {"rule": "tail", "optimizer": "fednova"}),
    ("personal: ditto.*rule: stack", {"rule": "stack", "personal": "ditto"}),
    ("setting upload: unknown stage 'zip'", {"upload": ("zip",)}),
    (
        "setting download: feedback on the way down",
        {"download": ("difference", "feedback", "int4")},
    ),
    ("dp_noise without dp_clip: .*set dp_clip", {"dp_noise": 1.0}),
    ("scaffold with dp_clip", {"optimizer": "scaffold", "dp_clip": 1.0, "dp_noise": 1.0}),
    ("personal: head.*no head trains", {"personal": "head", "method": "lora"}),
    ("personal: head.*no head trains", {"personal": "head", "method": "attention"}),
    ("sites_per_round below min_sites", {"sites_per_round": 2, "min_sites": 3}),
]


@pytest.mark.parametrize(("text", "settings"), REFUSED, ids=[str(s) for _, s in REFUSED])
def test_settings_that_have_no_meaning_together_are_refused(
    text: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=rf"^setting .*{text}|^{text}"):
        check(Federation(**settings))


ALLOWED: list[dict[str, Any]] = [
    {**HE, "optimizer": "fedprox"},
    {**HE, "rule": "core"},
    {"dp_clip": 1.0, "dp_noise": 1.0, "upload": ("difference", "int8", "deflate")},
    {"dp_clip": 1.0},
    {"optimizer": "fedadam"},
    {"optimizer": "fedavgm", "gauge": "aligned"},
    {"optimizer": "scaffold"},
    {"optimizer": "fednova", "rule": "ffa"},
    {"rule": "krum", "gauge": "paper", "site_ranks": {"A": 2}},
    {"rule": "stack", "energy": 0.9, "upload": ("difference", "fp16"), "site_ranks": {"A": 2}},
    {"rule": "median", "method": "decoder"},
    {"personal": "head", "method": "lora_decoder", "rule": "share_a"},
    {"personal": "ditto", "proximal_on": "products"},
    {"personal": "ditto", "gauge": "aligned"},
    {"personal": "ditto", "rule": "mean"},
    {"sites_per_round": 3, "min_sites": 3},
    {"min_sites": 3},
]


@pytest.mark.parametrize("settings", ALLOWED, ids=str)
def test_other_settings_pass(settings: dict[str, Any]) -> None:
    check(Federation(**settings))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_profile_passes_with_every_rule(profile: str, rule: str) -> None:
    check(Federation.of_profile(profile, {"rule": rule}))
    check(Federation.of_profile(profile))


def test_excluded_says_the_same_by_rule() -> None:
    assert "encryption: he" in excluded("svd")
    assert "encryption: he" not in excluded("ffa")
    assert set(excluded("stack")) == {
        "arch: bundle",
        "gauge other than balanced",
        "encryption: he",
        "optimizer: fednova, scaffold, fedavgm, fedadam, or server_rate other than 1",
        "download: difference",
        "personal: ditto",
    }
    for rule in RULES:
        assert all(reason and not reason.endswith(".") for reason in excluded(rule).values())
    with pytest.raises(ValueError, match="'mode' is not known"):
        excluded("mode")


@pytest.mark.parametrize("rule", sorted(RULES))
def test_what_excluded_lists_is_what_check_refuses(rule: str) -> None:
    listed = excluded(rule)
    for setting, change in {
        "arch: bundle": OWN,
        "encryption: he": {"encryption": "he", "cross_site": "global"},
        "site_ranks": {"site_ranks": {"A": 2}},
        "energy below 1": {"energy": 0.9},
        "optimizer: fednova": {"optimizer": "fednova"},
        "personal: ditto": {"personal": "ditto", "proximal_on": "products"},
        "optimizer: scaffold": {"optimizer": "scaffold"},
        "gauge other than balanced": {"gauge": "paper"},
    }.items():
        federation = Federation(rule=rule, **change)  # type: ignore[arg-type]
        if setting in listed:
            with pytest.raises(SettingsError, match=f"{setting} does not go with rule: {rule}"):
                check(federation)
        elif rule != "stack":  # refuses fednova with others, under one name
            check(federation)


def test_the_methods_named_here_are_those_of_the_network() -> None:
    assert set(ADAPTER_METHODS) == {name for name, method in METHODS.items() if method.lora}
    head = "mask_decoder.mask_tokens.weight"
    assert set(HEAD_METHODS) == {name for name, method in METHODS.items() if method.holds(head)}


@pytest.mark.parametrize("rule", sorted(n for n, rule in RULES.items() if rule.CARD.pairs))
def test_the_rules_that_choose_a_basis_are_those_that_turn_it(rule: str) -> None:
    sites = random_sites(5, [(6, 5, 2)])
    result = aggregation.aggregate(rule, sites, Round(start=sites[0].tensors, rank=2))
    assert result.turned == (rule in (*FROM_PRODUCTS, "stack"))
