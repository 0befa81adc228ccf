"""Tables of a run beside its scores: faults, times, privacy, settings, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flap_nvflare.report import blocks, figures
from flap_nvflare.report.charts import Table
from flap_nvflare.report.read import Run
from flap_nvflare.report.units import DASH, NONE, digits, plain_text, seconds_text
from flap_nvflare.report.values import mapping, number, shown

_MOST_FAULTS = 200


def fault_table(run: Run) -> tuple[Table, int] | None:
    """Answers that did not count, and how many lines of them are not shown."""
    found = figures.faults(run)
    if not found:
        return None
    lines = tuple(
        (
            shown(one.site),
            one.what,
            shown(one.reason, 200),
            shown(one.key, 80) or NONE,
            _rounds_text(one.rounds),
        )
        for one in found[:_MOST_FAULTS]
    )
    header = ("site", "what", "reason", "tensor", "rounds")
    return Table(header, lines, left=5), max(0, len(found) - _MOST_FAULTS)


def _rounds_text(rounds: Sequence[int]) -> str:
    """Rounds as ranges: "1-3, 7"."""
    parts: list[list[int]] = []
    for one in sorted(rounds):
        if parts and one == parts[-1][1] + 1:
            parts[-1][1] = one
        else:
            parts.append([one, one])
    text = ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in parts[:12])
    return text + (", …" if len(parts) > 12 else "")


def time_table(spent: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Mean seconds of a round by site and part."""
    if not spent:
        return None
    header = ("site", *blocks.TIMING_NAMES.values(), "all")
    lines = tuple(
        (
            shown(site),
            *(seconds_text(parts.get(name)) for name in blocks.TIMING_NAMES),
            seconds_text(sum(parts.values())),
        )
        for site, parts in spent.items()
    )
    return Table(header, lines)


def privacy_table(run: Run) -> Table | None:
    """Each site's budget; None without differential privacy."""
    found = figures.privacy(run)
    if not found:
        return None
    header = ("site", "ε, replace", "ε, zero-out", "δ", "clip", "noise", "messages")
    names = ("epsilon_replace", "epsilon_zero_out", "delta", "clip", "noise", "releases")
    lines = tuple(
        (
            shown(site),
            *(
                NONE if (value := number(said.get(name))) is None else digits(value)
                for name in names
            ),
        )
        for site, said in found.items()
    )
    return Table(header, lines)


def privacy_notes(run: Run) -> list[str]:
    """What holds of privacy and encryption."""
    found = []
    budget = figures.privacy(run)
    if budget:
        found.append(
            "The unit is the data of one site; messages are counted over all jobs on its data."
        )
        open_noise = sorted(site for site, said in budget.items() if said.get("secret") is False)
        if open_noise:
            names = ", ".join(shown(site) for site in open_noise[:12])
            found.append(f"The noise of {names} is drawn from a known seed: it protects NOTHING.")
    else:
        found.append("Differential privacy: none.")
    if run.setting("encryption") == "he":
        found.append(
            "Encryption: homomorphic. The server adds what it cannot read, so it measures no "
            "aggregation error."
        )
    elif not run.alone:
        found.append("Encryption of updates: none; the transport's own is FLARE's matter.")
    return found


def settings(run: Run) -> list[tuple[str, str]]:
    """Every setting of the federation."""
    return [(shown(name), shown(plain_text(value), 120)) for name, value in run.federation.items()]


def provenance(run: Run) -> list[tuple[str, str]]:
    """What makes the run repeatable: seed, base, parameters, versions."""
    said = run.description
    parameters, full = number(said.get("parameters")), number(said.get("full_parameters"))
    found = [
        ("seed", shown(plain_text(said.get("seed", run.setting("seed"))))),
        ("base, SHA-256", shown(said.get("base_sha256"), 64) or NONE),
        ("parameters that travel", NONE if parameters is None else f"{parameters:,.0f}"),
        ("parameters of full fine-tuning", NONE if full is None else f"{full:,.0f}"),
    ]
    versions = mapping(said.get("versions"))
    return found + [(shown(name), shown(version, 40)) for name, version in versions.items()]
