"""What may leave a site, in plain words, from the site's own files: for its IT, and its board."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flap_nvflare.sam import tuning
from flap_nvflare.settings import NAMED
from flap_nvflare.site.kit import Kit, home
from flap_nvflare.site.limits import MB, Limits
from flap_nvflare.site.policy import Policy, read_policy
from flap_nvflare.site.reasons import REASONS
from flap_nvflare.site.site_file import SITE_FILE, SiteFile, read_site_file

# Parts of the network by the pattern of their names.
PARTS = {
    tuning.ADAPTERS: "low-rank adapters beside the attention's query and value weights",
    tuning.OUTPUT: "output layers of the mask decoder",
    tuning.DECODER: "all of the mask decoder",
    tuning.DECODER_TRANSFORMER: "attention and layers of the mask decoder's transformer",
    tuning.ENCODER_ATTENTION: "attention weights of the image encoder",
    tuning.EVERYTHING: "every weight of the network",
}
# What a reply says beside its tensors, by the names that the executor gives them.
FIGURES = {
    "loss": "mean training loss",
    "dice": "mean Dice by class on the held out cases",
    "steps": "training steps",
    "slices": "count of training slices",
    "cases": "count of training cases",
    "seconds": "time of the round",
    "timings": "time by kind of work",
    "synthetic": "whether the scans are synthetic",
    "privacy": "with differential privacy: clip, noise and what was spent",
}
SCORES = (
    "at the end: Dice by class of each test and held out case, the cases numbered and not named"
)
NEVER = (
    "images and masks",
    "names of cases, patients, files or folders",
    "text of a file's header",
    "weights that the job's method does not train",
    "this site's settings and its own log's details",
)
# The example that sizes are given for: the paper's.
EXAMPLE: dict[str, Any] = {"arch": "vit_b", "image_size": 224, "classes": 2, "rank": 32}


def statement(kit: Kit) -> dict[str, Any]:
    """All that `site show` says, as plain values.

    Raises:
        SettingsError: if a file of the kit is bad, or a site's has not been laid.
    """
    policy = read_policy(kit)
    common = {"kit": str(kit.folder), "name": kit.name, "server": kit.server}
    if kit.server:
        return {**common, "policy": policy.to_dict()}
    ours = read_site_file(kit.local / SITE_FILE)
    source = kit.local / "custom" / "site_data.py"
    return {
        **common,
        "leaves": {
            "tensors": methods(tuple(name for name in ours.limits.methods if name != NAMED)),
            "own_network": own_network(ours),
            "example": EXAMPLE,
            "figures": FIGURES,
            "scores": SCORES,
            "failures": sorted(REASONS),
        },
        "never_leaves": list(NEVER),
        "data": {
            "data_root": str(ours.data_root or ""),
            "source": str(source) if source.is_file() else "",
            "synthetic_allowed": ours.allow_synthetic,
            "checkpoint": ours.checkpoint,
            "checkpoint_sha256": ours.checkpoint_sha256,
            "state_dir": str(ours.state_dir or home(kit) / "state"),
        },
        "limits": ours.limits.to_dict(),
        "policy": policy.to_dict(),
    }


def methods(allowed: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each method's update holds: names, and counts for `EXAMPLE`."""
    from flap_nvflare.sam.segmenter import blank_segmenter  # imports segment_anything

    model = blank_segmenter(**EXAMPLE, lora=True)
    rows = []
    for name in allowed:
        method = tuning.method_named(name)
        patterns = (*method.weights, *((tuning.ADAPTERS,) if method.lora else ()))
        tensors = tuning.trainable(model, name)
        numbers = sum(tensor.numel() for tensor in tensors.values())
        rows.append(
            {
                "method": name,
                "parts": [PARTS[pattern] for pattern in patterns],
                "patterns": list(patterns),
                "tensors": len(tensors),
                "numbers": numbers,
                "bytes": 4 * numbers,
            }
        )
    return rows


def own_network(ours: SiteFile) -> dict[str, Any]:
    """What may leave of the site's own network; empty where nothing may."""
    if NAMED not in ours.limits.methods:
        return {}
    return {"file": str(ours.bundle or ""), "parameters": list(ours.limits.parameters)}


def lines(kit: Kit) -> list[str]:
    """The statement as lines to read."""
    said = statement(kit)
    policy = read_policy(kit)
    head = [f"{'Server' if kit.server else 'Site'} {kit.name}, startup kit {kit.folder}"]
    if kit.server:
        return [*head, "", *_policy_lines(policy, server=True)]
    ours = read_site_file(kit.local / SITE_FILE)
    return [
        *head,
        "",
        *_leaving_lines(said["leaves"]["tensors"], said["leaves"]["own_network"], ours.limits),
        "",
        *_data_lines(ours, said["data"]["source"], said["data"]["state_dir"]),
        "",
        *_limit_lines(ours.limits),
        "",
        *_policy_lines(policy, server=False),
    ]


def _leaving_lines(rows: list[dict[str, Any]], own: Mapping[str, Any], limits: Limits) -> list[str]:
    size = "{arch} at {image_size} px, {classes} classes, rank {rank}".format(**EXAMPLE)
    found = [
        "What may leave this site",
        "  After a round of training, the tensors of the job's method, and of no method but these",
        f"  (sizes for {size}, before coding or encryption; at most {limits.max_update_mb:g} MB):",
    ]
    for row in rows:
        above = "" if row["bytes"] <= limits.max_update_mb * MB else ", too large to leave"
        found.append(
            f"    {row['method']}: {row['tensors']} tensors, {row['numbers']:,} numbers, "
            f"{row['bytes'] / MB:.2f} MB{above}: {'; '.join(row['parts'])}"
        )
    if own:
        names = ", ".join(own["parameters"])
        found += [
            f"    {NAMED}: of this site's own network the parameters that the job names, of these",
            f"      alone (* is any characters): {names}",
            f"      network: {own['file'] or 'none is named, so no such job can train here'}",
        ]
    found += ["  With them, as numbers:", *(f"    {text}" for text in FIGURES.values())]
    found += [
        f"  {SCORES[0].upper()}{SCORES[1:]}.",
        f"  On a failure: one of {len(REASONS)} fixed reasons and its numbers.",
        "What never leaves it",
        *(f"  {text}" for text in NEVER),
    ]
    if limits.dp_clip > 0:
        found.append(
            f"Updates leave with differential privacy only: clip at most {limits.dp_clip:g}, "
            f"noise at least {limits.dp_noise:g}."
        )
    if limits.choices.get("encryption") == ("he",):
        found.append("Updates leave encrypted only: the server sees sums.")
    return found


def _data_lines(ours: SiteFile, source: str, state: str) -> list[str]:
    weights = ours.checkpoint or "the small SAM of the package"
    pinned = ours.checkpoint_sha256 or "not pinned: any is accepted"
    scans = str(ours.data_root or "none named: this site takes no part")
    if not ours.data_root and ours.allow_synthetic:
        scans = "SYNTHETIC, for a rehearsal (allow_synthetic)"
    return [
        "Where its data come from",
        f"  scans: {scans}",
        f"  listed by: {source or 'their layout, as the package recognises it'}",
        f"  base model: {weights}; SHA-256 {pinned}",
        f"  kept here between rounds: {state}",
    ]


def _limit_lines(limits: Limits) -> list[str]:
    found = [
        "What a job may ask of it (all else is refused before anything is built)",
        f"  training cases here: at least {limits.min_cases}, or this site takes no part",
        f"  method: {', '.join(limits.methods)}",
    ]
    for name, (low, high) in limits.ranges.items():
        found.append(f"  {name}: from {low:g} to {high:g}")
    for name, values in limits.choices.items():
        found.append(f"  {name}: {', '.join(values)}")
    return found


def _policy_lines(policy: Policy, server: bool) -> list[str]:
    listed = "a job may only name components on the allow-list"
    found = [
        "Who decides",
        _either(not policy.roles_with_code, "custom code in jobs: off", _code(policy)),
        _either(policy.components_enforced, listed, "any class in a job: ON"),
        _either(
            not policy.loose_components,
            "the list names classes of this package one by one",
            f"a job may call any function of {', '.join(policy.loose_components)}",
        ),
        _either(
            not policy.roles_with_files,
            "files here are read through FLARE's console by this organisation alone",
            "files here may be read through FLARE's console from any organisation by "
            f"{', '.join(policy.roles_with_files)}",
        ),
    ]
    if not server:
        found += [
            _either(policy.gate, "this site's gate: on, both ways", "this site's gate: OFF"),
            _either(
                policy.last_gate,
                "last gate on what leaves, and audit of every message: on",
                "last gate on what leaves, and audit of every message: OFF",
            ),
            _either(
                not policy.uploads_logs,
                "FLARE uploads no log of this site",
                "FLARE uploads this site's error_log.txt to the server",
            ),
            "Site-side code wins over anything a job says.",
        ]
    return found


def _code(policy: Policy) -> str:
    return (
        f"custom code in jobs: ON for {', '.join(policy.roles_with_code)}; nothing said above is "
        "sure then"
    )


def _either(good: bool, yes: str, no: str) -> str:
    return f"  [ok]   {yes}" if good else f"  [MEND] {no}; run flap-nvflare site init"
