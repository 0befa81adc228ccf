"""What a kit's own files say about who decides here: custom code, gates, audit, logs.

Read from the files that FLARE reads, by the same precedence: a site's own file, else the default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flap_nvflare.site.kit import Kit, read_json
from flap_nvflare.site.merge import (
    ALLOW_LIST,
    COMPONENTS,
    bringing_code,
    reading_files,
)

GATE = "flap_nvflare.flare.site_gate.SiteGate"
LAST_GATE = "flap_nvflare.flare.last_gate.LastGate"
_PACKAGE = "flap_nvflare"
_FILTERS = ("task_data_filters", "task_result_filters")


@dataclass(frozen=True)
class Policy:
    """Who decides at this site.

    Attributes:
        roles_with_code: roles whose jobs may bring their own code; empty is as it should be.
        roles_with_files: roles of any organisation that may read files here by FLARE's console.
        components_enforced: whether a job may only name components on the allow-list.
        loose_components: entries of the list that allow whole modules of this package, whose
            every function a job could then call.
        gate: whether the site's own filter looks at every message, both ways.
        last_gate: whether a component has the last word on what leaves, after a job's filters, and
            writes every message into the site's audit file before it leaves.
        uploads_logs: whether FLARE may send this site's log files to the server.
    """

    roles_with_code: tuple[str, ...]
    roles_with_files: tuple[str, ...]
    components_enforced: bool
    loose_components: tuple[str, ...]
    gate: bool
    last_gate: bool
    uploads_logs: bool

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def read_policy(kit: Kit) -> Policy:
    """The policy in force when FLARE next starts with this kit.

    Raises:
        SettingsError: if a file cannot be read.
    """
    resources = _own_or_default(kit, "resources.json")
    authorization = _own_or_default(kit, "authorization.json")
    path = kit.local / "privacy.json"
    privacy = read_json(path) if path.is_file() else {}
    allowed = [str(entry) for entry in resources.get(ALLOW_LIST, [])]
    return Policy(
        roles_with_code=tuple(bringing_code(authorization)),
        roles_with_files=tuple(reading_files(authorization)),
        components_enforced="*" not in allowed
        and resources.get("class_list_enforcement_mode", "enforce") == "enforce",
        loose_components=tuple(entry for entry in allowed if _is_loose(entry)),
        gate=_gated(privacy),
        # FLARE builds these components in a job's process, and only beside a scope.
        last_gate=LAST_GATE in _paths(_entries(privacy, COMPONENTS))
        and bool(_entries(privacy, "scopes")),
        uploads_logs=resources.get("allow_log_streaming", True) is not False,
    )


def _own_or_default(kit: Kit, name: str) -> dict[str, Any]:
    own = kit.local / name
    return read_json(own if own.is_file() else kit.local / f"{name}.default")


def _is_loose(entry: str) -> bool:
    """Whether the entry is this package or a part of it that is no class."""
    first, _, rest = entry.partition(".")
    return first == _PACKAGE and not rest.rpartition(".")[2][:1].isupper()


def _gated(privacy: Mapping[str, Any]) -> bool:
    """Whether every scope of `privacy.json` has the gate both ways, and one is the default."""
    scopes = _entries(privacy, "scopes")
    names = {scope.get("name") for scope in scopes}
    return privacy.get("default_scope") in names and all(
        GATE in _paths(_entries(scope, way)) for scope in scopes for way in _FILTERS
    )


def _entries(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = values.get(name)
    return [entry for entry in found or [] if isinstance(entry, Mapping)]


def _paths(components: list[Mapping[str, Any]]) -> Iterator[str]:
    for component in components:
        if component.get("disabled") is not True:
            yield str(component.get("path", ""))
