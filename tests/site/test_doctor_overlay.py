"""What a hospital lays over its kit: there, and missing in each part."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit_files import lay_overlay

from flap_nvflare.site.doctor_overlay import (
    AT_SERVER,
    AT_SITE,
    check_allow_list,
    check_custom_code,
    check_files,
    check_gate,
)
from flap_nvflare.site.finding import guarded
from flap_nvflare.site.kit import Kit

JOB = Path(__file__).parents[2] / "jobs" / "fed_kits"
ALLOWED = "class_allow_list"


@pytest.fixture
def laid(kit: Kit) -> Kit:
    lay_overlay(kit)
    return kit


def edit(kit: Kit, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = kit.local / name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_laid_overlay(laid: Kit) -> None:
    findings = [*check_allow_list(laid), *check_gate(laid), *check_custom_code(laid)]
    assert [f.name for f in findings] == ["allow-list", "gate", "last gate", "code in jobs"]
    assert all(f.ok for f in findings), findings


def test_a_bare_kit_names_the_command_that_lays_it(kit: Kit) -> None:
    findings = [*check_allow_list(kit), *check_gate(kit), *check_custom_code(kit)]
    assert [f.ok for f in findings] == [False] * 3
    assert {f.mend for f in findings} == {f"flap-nvflare site init {kit.folder}"}
    assert "lead, project_admin" in findings[2].found


def test_an_allow_list_without_the_package(laid: Kit) -> None:
    edit(laid, "resources.json", lambda v: v.update(class_allow_list=["nvflare."]))
    (finding,) = check_allow_list(laid)
    assert finding.ok is False
    assert "lacks flap_nvflare.flare.executor.FlapExecutor" in finding.found


def test_an_allow_list_of_single_classes(laid: Kit) -> None:
    names = [f"flap_nvflare.flare.{name}" for name in AT_SITE]
    edit(laid, "resources.json", lambda v: v.update(class_allow_list=names))
    assert next(check_allow_list(laid)).ok is True
    edit(laid, "resources.json", lambda v: v.update(class_allow_list=names[1:]))
    (finding,) = check_allow_list(laid)
    assert finding.found.endswith(f"lacks {names[0]}")
    edit(laid, "resources.json", lambda v: v.update(class_allow_list=["flap_nvflare.flare"]))
    assert next(check_allow_list(laid)).ok is True


@pytest.mark.parametrize("change", [{"class_list_enforcement_mode": "warn"}, {ALLOWED: ["*"]}])
def test_an_allow_list_that_lets_anything_in(laid: Kit, change: dict[str, Any]) -> None:
    edit(laid, "resources.json", lambda v: v.update(change))
    (finding,) = check_allow_list(laid)
    assert finding.ok is False
    assert "any class" in finding.found


@pytest.mark.parametrize(("side", "names"), [("client", AT_SITE), ("server", AT_SERVER)])
def test_what_the_jobs_name_is_what_is_looked_for(side: str, names: tuple[str, ...]) -> None:
    path = JOB / "app" / "config" / f"config_fed_{side}.json"
    found = set(re.findall(r"flap_nvflare\.flare\.([a-zA-Z_.]+)", path.read_text()))
    assert found == set(names)


def test_a_policy_of_which_one_scope_is_open(laid: Kit) -> None:
    edit(laid, "privacy.json", lambda v: v["scopes"].append({"name": "public"}))
    gate, last = check_gate(laid)
    assert gate.ok is False
    assert "not in every scope" in gate.found
    assert last.ok is True


def test_a_policy_whose_default_scope_is_not_there(laid: Kit) -> None:
    edit(laid, "privacy.json", lambda v: v.update(default_scope="flop"))
    gate, _ = check_gate(laid)
    assert gate.ok is False
    assert "none of its scopes" in gate.found


def test_a_last_gate_that_is_switched_off(laid: Kit) -> None:
    edit(laid, "privacy.json", lambda v: v["components"][0].update(disabled=True))
    gate, last = check_gate(laid)
    assert (gate.ok, last.ok) == (True, False)


def test_a_gate_that_looks_one_way_only(laid: Kit) -> None:
    edit(laid, "privacy.json", lambda v: v["scopes"][0].update(task_data_filters=[]))
    assert next(check_gate(laid)).ok is False


def test_files_that_are_read_from_outside(laid: Kit) -> None:
    assert next(check_files(laid)).ok is True
    edit(laid, "resources.json", lambda v: v.update(allow_log_streaming=True))
    assert "allow_log_streaming" in next(check_files(laid)).found
    edit(laid, "authorization.json", lambda v: v.update(permissions={"lead": "any"}))
    assert "console, for lead" in next(check_files(laid)).found


def test_no_last_gate(laid: Kit) -> None:
    one = {"id": "last", "path": "flap_nvflare.flare.last_gate.LastGate"}
    edit(laid, "privacy.json", lambda v: v.update(components=[{"path": "elsewhere"}]))
    edit(laid, "resources.json", lambda v: v.update(components=[one]))  # the wrong place
    gate, last = check_gate(laid)
    assert (gate.ok, last.ok) == (True, False)
    edit(laid, "privacy.json", lambda v: v.pop("components"))
    assert list(check_gate(laid))[1].ok is False


@pytest.mark.parametrize(
    ("granted", "open_"),
    [
        ("any", True),
        ("none", False),
        (" None ", False),
        ({"byoc": "none", "view": "any"}, False),
        ({"view": "any"}, False),
        ({"byoc": "o:site"}, True),
        ({"byoc": ["none", "n:submitter"]}, True),
        (["none"], False),
    ],
)
def test_who_may_bring_code(laid: Kit, granted: object, open_: bool) -> None:
    edit(laid, "authorization.json", lambda v: v.update(permissions={"lead": granted}))
    (finding,) = check_custom_code(laid)
    assert (finding.ok is False) == open_


def test_a_file_that_is_no_json(laid: Kit) -> None:
    (laid.local / "resources.json").write_text("{")
    (finding,) = guarded("allow-list", lambda: check_allow_list(laid))
    assert finding.ok is False
    assert "restore the file" in finding.mend
