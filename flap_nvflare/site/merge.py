"""FLARE's own configuration files of a kit, changed as little as a site's policy needs.

Everything that FLARE's provisioning wrote stays, so a file made here is still FLARE's. Merging
twice gives what merging once gives.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from flap_nvflare.settings import SettingsError

ALLOW_LIST = "class_allow_list"
COMPONENTS = "components"
SERVERS = "servers"
CUSTOM_CODE = "byoc"  # FLARE's name of the right to bring one's own code
READ_FILES = "shell_commands"
# What also runs code that came from elsewhere.
_CODE_RIGHTS = (CUSTOM_CODE, "server-predeployed-flwr")
# A role that FLARE grants "any" as a whole has these: a whole grant knows no exception.
RIGHTS = (
    "submit_job", "clone_job", "manage_job", "download_job", "download_job_components", "list_job",
    "get_job_log", "view", "operate", READ_FILES, "app_command", "list_studies", "show_study",
    "register_study", "remove_study", "add_study_site", "remove_study_site", "add_study_user",
    "remove_study_user",
)  # fmt: skip
_ALL, _NONE, _OWN = "any", "none", "o:site"


def merged(base: Mapping[str, Any], fragment: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the fragment laid over it; neither is changed.

    Objects are merged key by key, `components` entry by entry of the same `id`, the fragment's one
    entry of `servers` into each. The allow-list grows, and any other value of the fragment takes
    the place of that of `base`.

    Raises:
        SettingsError: if `base` has no allow-list to grow: one of the fragment's names alone
            would shut out all of FLARE's own.
    """
    result = copy.deepcopy(dict(base))
    for name, value in fragment.items():
        if name == ALLOW_LIST:
            if not isinstance(result.get(name), list):
                raise SettingsError(
                    f"resources.json has no list {name!r}; provision the kit with FLARE 2.9, whose "
                    "resources.json.default has one"
                )
            result[name] += [entry for entry in value if entry not in result[name]]
        elif name == COMPONENTS:
            result[name] = _by_id(result.get(name) or [], value)
        elif name == SERVERS:
            result[name] = [merged(server, value[0]) for server in result.get(name) or [{}]]
        elif isinstance(value, Mapping) and isinstance(result.get(name), Mapping):
            result[name] = merged(result[name], value)
        else:
            result[name] = copy.deepcopy(value)
    return result


def _by_id(base: list[Any], fragment: list[Any]) -> list[Any]:
    """Components of one id are one; those of a new id come after the others."""
    result = list(base)
    for component in fragment:
        places = [n for n, known in enumerate(result) if known.get("id") == component["id"]]
        if places:
            result[places[0]] = merged(result[places[0]], component)
        else:
            result.append(copy.deepcopy(component))
    return result


def without_custom_code(authorization: Mapping[str, Any]) -> dict[str, Any]:
    """FLARE's `authorization.json` in which no role may bring code, and all else is as it was.

    And no role of another organisation may read this machine's files through the console (FLARE
    grants its project administrator that as well).

    Raises:
        SettingsError: if it is not as FLARE's provisioning writes it.
    """
    result = copy.deepcopy(dict(authorization))
    permissions = result.get("permissions")
    if not isinstance(permissions, dict) or not permissions:
        raise SettingsError(
            "authorization.json has no 'permissions'; restore authorization.json.default"
        )
    for role, rights in permissions.items():
        if not isinstance(rights, dict):
            rights = dict.fromkeys(RIGHTS, rights)
        rights = {**rights, **dict.fromkeys(_CODE_RIGHTS, _NONE)}
        if rights.get(READ_FILES) in (_ALL, [_ALL], "all", ["all"]):
            rights[READ_FILES] = _OWN
        permissions[role] = rights
    return result


def bringing_code(authorization: Mapping[str, Any]) -> list[str]:
    """The roles whose jobs may bring code, for all that the file says."""
    permissions = authorization.get("permissions")
    if not isinstance(permissions, Mapping):
        return ["anyone"]
    return [role for role, rights in permissions.items() if not _denied(rights, CUSTOM_CODE)]


def reading_files(authorization: Mapping[str, Any]) -> list[str]:
    """The roles that may read files here through the console from any organisation."""
    permissions = authorization.get("permissions")
    if not isinstance(permissions, Mapping):
        return ["anyone"]
    return [
        role
        for role, rights in permissions.items()
        if not _denied(rights, READ_FILES)
        and not (isinstance(rights, Mapping) and rights.get(READ_FILES) in (_OWN, "org:site"))
    ]


def _denied(rights: object, right: str) -> bool:
    """A right that a role's entry does not name is denied; a whole grant counts for all."""
    value = rights.get(right, _NONE) if isinstance(rights, Mapping) else rights
    words = value if isinstance(value, list) else [value]
    return all(str(word).strip().lower() in (_NONE, "no") for word in words)
