"""Whether what the hospital lays over its kit is there: allow-list, gate, no code in jobs."""

from __future__ import annotations

from collections.abc import Iterator

from flap_nvflare.site.finding import Finding
from flap_nvflare.site.kit import Kit, read_json
from flap_nvflare.site.policy import read_policy

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
PRIVACY = "privacy.json"


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
    """Whether the site's own policy filters both ways, and has the last word on what leaves."""
    path = kit.local / PRIVACY
    if not path.is_file():
        found = f"{path}: missing: only the job decides what leaves this site"
        yield Finding("gate", False, found, lay(kit))
        return
    policy = read_policy(kit)
    if policy.gate:
        yield Finding("gate", True, f"in every scope of {path.name}, both ways")
    else:
        found = f"{path}: not in every scope, both ways, or default_scope is none of its scopes"
        yield Finding("gate", False, found, lay(kit))
    last = policy.last_gate
    found = "after the job's own filters" if last else "a job's filters have the last word"
    yield Finding("last gate", last, found, "" if last else lay(kit))


def check_custom_code(kit: Kit) -> Iterator[Finding]:
    """Whether a job may bring code of its own (FLARE's right `byoc`)."""
    roles = read_policy(kit).roles_with_code
    if roles:
        found = f"jobs of {', '.join(sorted(roles))} may bring code, which runs on this machine"
        yield Finding("code in jobs", False, found, lay(kit))
    else:
        yield Finding("code in jobs", True, "refused for every role")


def check_files(kit: Kit) -> Iterator[Finding]:
    """Whether anyone elsewhere reads files of this machine: by FLARE's console, or sent logs."""
    policy = read_policy(kit)
    ways = [f"FLARE's console, for {role}" for role in policy.roles_with_files]
    if policy.uploads_logs and not kit.server:
        ways.append("logs that FLARE sends (allow_log_streaming)")
    found = f"read from outside by {'; '.join(ways)}" if ways else "read by nobody outside"
    yield Finding("files here", not ways, found, lay(kit) if ways else "")


def lay(kit: Kit) -> str:
    """How the overlay is laid."""
    return f"flap-nvflare site init {kit.folder}"


def _covers(entry: str, name: str) -> bool:
    """FLARE: an entry is a class, or a package with everything in it."""
    return entry == ALL or name == entry or name.startswith(entry.rstrip(".") + ".")
