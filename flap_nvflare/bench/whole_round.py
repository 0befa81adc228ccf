"""Where a round's wall-clock goes: `python -m flap_nvflare.bench.whole_round RUN`.

Reads `rounds.jsonl` of a finished run. Sites work side by side, so a round lasts as long as its
slowest site; the table follows that site, and what it does not account for is the start of
processes, transport, and waiting for the server.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = {
    "steps": "training steps",
    "read": "reading scans",
    "evaluate": "scoring the adapter received",
    "open": "network and adapter",
    "save": "writing adapter and moments",
    "aggregation": "aggregation at the server",
    "rest": "start of processes, transport, waiting",
}


def spent(line: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a round by what they went to, in the order of `WORDS`.

    Args:
        line: a line of `rounds.jsonl`.

    Raises:
        ValueError: if no site of the round told its timings.
    """
    sites = [site for site in line["sites"].values() if site.get("timings")]
    if not sites:
        raise ValueError(f"round {line['round']}: no site told what its seconds went to")
    slowest = max(sites, key=lambda site: sum(site["timings"].values()))
    known = {**slowest["timings"], "aggregation": line["aggregation_seconds"]}
    known["rest"] = max(0.0, line["seconds"] - sum(known.values()))
    return {name: known.get(name, 0.0) for name in WORDS}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """All rounds together as a Markdown table of seconds and shares."""
    totals = dict.fromkeys(WORDS, 0.0)
    for line in lines:
        for name, seconds in spent(line).items():
            totals[name] += seconds
    whole = sum(totals.values())
    rows = [
        f"| {WORDS[name]} | {seconds:.1f} | {seconds / whole:.1%} |"
        for name, seconds in totals.items()
    ]
    head = [f"| {len(lines)} rounds, {whole:.1f} s | seconds | share |", "|---|---:|---:|"]
    return "\n".join(head + rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.bench.whole_round", description="Where a round's time goes."
    )
    parser.add_argument("run", type=Path, help="folder of a run, with its rounds.jsonl")
    path = parser.parse_args(arguments).run / "rounds.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        print(table(lines))
    except (OSError, ValueError, KeyError) as error:
        print(f"whole_round: {path}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
