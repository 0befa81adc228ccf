"""FLARE's files with a site's policy over them: what stays, what changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from flap_nvflare.settings import SettingsError
from flap_nvflare.site.merge import (
    RIGHTS,
    bringing_code,
    merged,
    reading_files,
    without_custom_code,
)

BASE: dict[str, Any] = {
    "class_allow_list": ["a.B"],
    "client": {"retry_timeout": 30, "compression": "Gzip"},
    "components": [
        {"id": "one", "path": "p", "args": {"x": 1, "y": 2}},
        {"id": "two", "path": "q"},
    ],
}


def test_a_fragment_adds_and_replaces_and_leaves_the_rest() -> None:
    before = copy.deepcopy(BASE)
    fragment = {
        "class_allow_list": ["c.D", "a.B"],
        "client": {"retry_timeout": 5},
        "components": [{"id": "one", "path": "other", "args": {"x": 9}}, {"id": "three"}],
        "extra": False,
    }
    once = merged(BASE, fragment)
    assert once == {
        "class_allow_list": ["a.B", "c.D"],
        "client": {"retry_timeout": 5, "compression": "Gzip"},
        "components": [
            {"id": "one", "path": "other", "args": {"x": 9, "y": 2}},
            {"id": "two", "path": "q"},
            {"id": "three"},
        ],
        "extra": False,
    }
    assert merged(once, fragment) == once
    assert before == BASE


def test_a_list_of_allowed_components_is_never_made_from_nothing() -> None:
    with pytest.raises(SettingsError, match="class_allow_list"):
        merged({}, {"class_allow_list": ["a.B"]})


def test_nobody_brings_code_and_a_whole_grant_keeps_all_else() -> None:
    file = {
        "format_version": "1.0",
        "permissions": {
            "project_admin": "any",
            "lead": {"submit_job": "any", "byoc": "any", "shell_commands": "o:site"},
            "guest": ["o:site", "n:submitter"],
            "member": {"view": "any"},
        },
    }
    assert bringing_code(file) == ["project_admin", "lead", "guest"]
    assert reading_files(file) == ["project_admin", "guest"]
    once = without_custom_code(file)
    assert bringing_code(once) == []
    admin = once["permissions"]["project_admin"]
    assert {name for name, value in admin.items() if value == "any"} == set(RIGHTS) - {
        "shell_commands"
    }
    assert admin["shell_commands"] == "o:site"
    assert once["permissions"]["lead"]["submit_job"] == "any"
    assert once["permissions"]["guest"]["view"] == ["o:site", "n:submitter"]
    assert without_custom_code(once) == once
    assert file["permissions"]["project_admin"] == "any"


@pytest.mark.parametrize("file", [{}, {"permissions": {}}, {"permissions": []}])
def test_a_file_of_another_form_is_refused_and_counts_as_open(file: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="permissions"):
        without_custom_code(file)
    if not isinstance(file.get("permissions"), dict):
        assert bringing_code(file) == reading_files(file) == ["anyone"]
