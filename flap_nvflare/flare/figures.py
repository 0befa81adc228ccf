"""What experiment trackers are shown of a round: plain numbers under a fixed list of names.

All of them stand in the round's line of `rounds.jsonl` already, which the server wrote from reports
that it has checked, so a tracker shows nothing else and asks nothing more of any site. Trackers get
one mean loss a round: steps stay at their site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# Under this name stand the figures of the whole federation; with a blank, which no site's name has.
ALL_SITES = "all sites"
_REPORTED = ("loss", "steps", "slices", "cases", "seconds")
_EPSILONS = ("epsilon_replace", "epsilon_zero_out")


def round_figures(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of one line of `rounds.jsonl`, by site and name; what is not known is left out.

    Validation Dice is that of the adapter that came with the round, before its training.

    Args:
        line: as `ServerJob.round_line` makes it.

    Returns:
        For each site of the line, and for `ALL_SITES`, numbers by name: those of a site are
        listed in `_of_site`, the others in `_of_all`.
    """
    refused = Counter(one["site"] for one in line["refused"])
    found = {
        site: _of_site(line["sites"].get(site, {}), line["bytes"].get(site, {}), refused[site])
        for site in sorted({*line["sites"], *line["bytes"], *refused})
    }
    return {**found, ALL_SITES: _of_all(line, found)}


def _of_site(report: Mapping[str, Any], ways: Mapping[str, int], refused: int) -> dict[str, float]:
    privacy = report.get("privacy", {})
    return _known(
        {
            **{name: report.get(name) for name in _REPORTED},
            **_under("validation_dice", report.get("dice", {})),
            **_under("timings", report.get("timings", {})),
            **_under("privacy", {name: privacy.get(name) for name in _EPSILONS}),
            "bytes_up": ways.get("up"),
            "bytes_down": ways.get("down"),
            "refused": refused,
        }
    )


def _of_all(line: Mapping[str, Any], sites: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Loss and Dice are means over the sites that know them, bytes are sums."""
    means = {
        name: _mean(figures[name] for figures in sites.values() if name in figures)
        for name in sorted({name for figures in sites.values() for name in figures})
        if name == "loss" or name.startswith("validation_dice/")
    }
    return _known(
        {
            **means,
            "seconds": line["seconds"],
            "aggregation_seconds": line["aggregation_seconds"],
            "aggregation_error": line["aggregation_error"],
            "bytes_up": sum(ways["up"] for ways in line["bytes"].values()),
            "bytes_down": sum(ways["down"] for ways in line["bytes"].values()),
            "counted": len(line["sites"]),
            "excluded": len(line["excluded"]),
            "missing": len(line["missing"]),
            "refused": len(line["refused"]),
        }
    )


def _under(group: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": figure for name, figure in figures.items()}


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _known(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if figure is not None}
