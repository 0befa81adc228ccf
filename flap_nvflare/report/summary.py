"""The run in a handful of figures: what `--json` prints, and what comparisons set side by side."""

from __future__ import annotations

from typing import Any

from flap_nvflare.report import figures, scores
from flap_nvflare.report.read import Run
from flap_nvflare.report.values import number, shown


def summary(run: Run) -> dict[str, Any]:
    """Plain values; what a run does not say is None."""
    model, dice = scores.result_dice(run)
    total = figures.total_traffic(run)
    found = figures.faults(run)
    return {
        "run": run.name,
        "folder": str(run.path),
        "kind": "alone" if run.alone else "federation",
        "data": run.data,
        "finished": run.finished,
        "rounds_finished": len(run.rounds),
        "rounds": run.planned,
        "sites": list(run.sites),
        "dice": {
            "split": run.split,
            "model": model or None,
            "mean": dice.mean,
            "low": dice.low,
            "high": dice.high,
            "worst": dice.worst,
            "worst_site": dice.worst_site or None,
        },
        "bytes": {
            "up": total.up,
            "down": total.down,
            "full_fine_tuning": total.full,
            "times_fewer": total.fewer,
            "evaluation": figures.evaluation_bytes(run),
        },
        "seconds": figures.total_seconds(run),
        "refused": sum(len(one.rounds) for one in found if one.what == "refused"),
        "no_answer": sum(len(one.rounds) for one in found if one.what == "no answer"),
        "epsilon": figures.epsilon(run),
        "encryption": shown(run.setting("encryption")) or None,
        "collaborative_gain": number(scores.gain(run).get("mean")),
        "evaluated": bool(run.evaluation),
    }
