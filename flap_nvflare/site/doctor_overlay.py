"""Whether what the hospital lays over its kit is there: allow-list, gate, no code in jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flap_nvflare.site.finding import Finding
from flap_nvflare.site.kit import Kit, read_json

PACKAGE = "flap_nvflare"
# What the jobs name at a site and at the server; FLARE builds nothing that is not listed.
AT_SITE = (
    "executor.FlapExecutor",
    "filters.AdapterOnlyFilter",
    "coding.DecodeAdapter",
    "coding.EncodeUpdate",
    "coding.PrivacyFilter",
    "encryption.DecryptAdapter",
    "encryption.EncryptUpdate",
)
AT_SERVER = (
    "controller.FlapController",
    "aggregator.FlapAggregator",
    "persistor.FlapPersistor",
    "coding.EncodeAdapter",
    "coding.DecodeUpdate",
)
ALL = "*"
# Each lets through what the method trains, and nothing else.
GATES = {
    "flap_nvflare.flare.site_gate.SiteGate",
    "flap_nvflare.flare.filters.AdapterOnlyFilter",
}
LAST_GATE = "flap_nvflare.flare.last_gate.LastGate"


def check_allow_list(kit: Kit) -> Iterator[Finding]:
    """Whether FLARE may load the components of this package's jobs, and not just any."""
    path = kit.local / "resources.json"
    if not path.is_file():
        found = f"{path}: missing, so FLARE's default counts, which refuses this package"
        yield Finding("allow-list", False, found, lay(kit))
        return
    resources = read_json(path)
    listed = resources.get("class_allow_list", [])
    allowed = [str(entry) for entry in listed] if isinstance(listed, list) else []
    needed = [f"{PACKAGE}.flare.{name}" for name in (AT_SERVER if kit.server else AT_SITE)]
    refused = [name for name in needed if not any(_covers(entry, name) for entry in allowed)]
    mode = resources.get("class_list_enforcement_mode", "enforce")
    found = mend = ""
    if refused:
        found = f"{path}: class_allow_list lacks {', '.join(refused)}"
        mend = lay(kit)
    elif ALL in allowed or mode != "enforce":
        found = f"{path}: any class on this disk is loaded (mode {mode!r})"
        mend = f"take {ALL!r} out of class_allow_list, set the mode to 'enforce', or {lay(kit)}"
    if found:
        yield Finding("allow-list", False, found, mend)
    else:
        yield Finding("allow-list", True, f"{len(allowed)} entries, this package's among them")


def check_gate(kit: Kit) -> Iterator[Finding]:
    """Whether the site's own policy filters what leaves, whatever a job says."""
    path = kit.local / "privacy.json"
    if not path.is_file():
        found = f"{path}: missing: only the job decides what leaves this site"
        yield Finding("gate", False, found, lay(kit))
        return
    policy = read_json(path)
    wanted = policy.get("default_scope")
    scopes = [s for s in policy.get("scopes", []) if isinstance(s, dict)]
    chosen = [scope for scope in scopes if scope.get("name") == wanted]
    open_ = [
        str(scope.get("name"))
        for scope in scopes
        if not GATES & paths_in(scope.get("task_result_filters"))
    ]
    if not chosen or open_:
        found = (
            f"{path}: default_scope {wanted!r} is none of its scopes"
            if not chosen
            else f"{path}: nothing stops what leaves in scope {', '.join(open_)}"
        )
        yield Finding("gate", False, found, lay(kit))
    else:
        yield Finding("gate", True, f"in every scope of {path.name}, on what leaves")
    # Only components of this file are sure to be built in the process of a job.
    last = LAST_GATE in paths_in(policy.get("components"))
    found = "after the job's own filters" if last else "a job's filters have the last word"
    yield Finding("last gate", last, found, "" if last else lay(kit))


def check_custom_code(kit: Kit) -> Iterator[Finding]:
    """Whether a job may bring code of its own (FLARE's right `byoc`)."""
    path = kit.local / "authorization.json"
    if not path.is_file():
        path = path.with_name("authorization.json.default")
    rights = read_json(path).get("permissions", {})
    open_ = sorted(role for role, granted in rights.items() if _may_bring_code(granted))
    if open_:
        found = f"{path}: jobs of {', '.join(open_)} may bring code, which runs on this machine"
        yield Finding("code in jobs", False, found, lay(kit))
    else:
        yield Finding("code in jobs", True, f"refused for every role, by {path.name}")


def lay(kit: Kit) -> str:
    """How the overlay is laid."""
    return f"flap-nvflare site init {kit.folder}"


def paths_in(entries: Any) -> set[str]:
    """Class paths of a list of FLARE's component entries."""
    if not isinstance(entries, list):
        return set()
    return {str(entry.get("path")) for entry in entries if isinstance(entry, dict)}


def _covers(entry: str, name: str) -> bool:
    """FLARE: an entry is a class, or a package with everything in it."""
    return entry == ALL or name == entry or name.startswith(entry.rstrip(".") + ".")


def _may_bring_code(granted: object) -> bool:
    """FLARE: words for all rights at once, or for each by name; what is not named is refused."""
    if isinstance(granted, dict):
        granted = granted.get("byoc", "none")
    words = granted if isinstance(granted, list) else [granted]
    return any(str(word).strip().lower() not in ("none", "no") for word in words)
