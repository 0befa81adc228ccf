"""What `flap-nvflare doctor` prints: findings as lines for a person or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flap_nvflare.data.cases import Case
    from flap_nvflare.site.finding import Finding


def run(parsed: argparse.Namespace) -> int:
    """Asks the doctor and prints; the exit code is 0 only if nothing failed."""
    from flap_nvflare.settings import Federation
    from flap_nvflare.site.doctor import Questions, checks

    questions = Questions(
        data_root=parsed.data_root,
        checkpoint=parsed.checkpoint,
        site=parsed.site,
        federation=Federation.load(parsed.federation) if parsed.federation else None,
        picture=parsed.picture,
        timeout=parsed.timeout,
        watch=_progress,
    )
    findings = checks(parsed.kit, questions)
    failed = sum(finding.ok is False for finding in findings)
    print(as_json(findings) if parsed.json else as_text(findings))
    return 1 if failed else 0


def as_json(findings: Iterable[Finding]) -> str:
    """One object: `ok`, and the findings with name, verdict, what was found and the mend."""
    rows = [
        {"name": f.name, "verdict": f.verdict, "found": f.found, "mend": f.mend} for f in findings
    ]
    return json.dumps({"ok": all(row["verdict"] != "fail" for row in rows), "findings": rows})


def as_text(findings: Iterable[Finding]) -> str:
    """A line for each finding, what to do under each failure, and a count."""
    findings = list(findings)
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<8}{finding.name:<{width}}  {finding.found}")
        if finding.mend:
            lines.append(f"{'':<{width + 10}}-> {finding.mend}")
    counts = {name: sum(f.verdict == name for f in findings) for name in ("ok", "fail", "skipped")}
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    return "\n".join([*lines, "", f"{said}. Nothing of this was sent anywhere."])


def _progress(cases: list[Case]) -> Iterable[Case]:
    """The cases, with a bar on the error stream: a program reads the output."""
    from rich.console import Console
    from rich.progress import track

    return track(cases, description="Reading cases", console=Console(stderr=True))
