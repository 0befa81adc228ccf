"""What trackers are shown of a line of `rounds.jsonl`."""

from __future__ import annotations

from flap_nvflare.flare.figures import ALL_SITES, round_figures

LINE = {
    "round": 3,
    "seconds": 9.5,
    "validation_dice_received": 0.4,
    "aggregation_seconds": 0.2,
    "aggregation_error": None,
    "excluded": ["B"],
    "taking_part": ["A", "B", "C", "D"],
    "sites": {
        "A": {
            "loss": 0.5,
            "steps": 7,
            "synthetic": True,
            "timings": {"steps": 1.5},
            "privacy": {"clip": 1.0, "epsilon_replace": 2.5, "epsilon_zero_out": None},
            "dice": {"kidney": 0.6, "tumour": None, "mean": 0.6},
            "bytes_up": 10,
            "bytes_down": 20,
        },
        "B": {"loss": 1.0, "dice": {"kidney": 0.2, "tumour": 0.2, "mean": 0.2}, "timings": {}},
    },
    "missing": ["D"],
    "bytes": {"A": {"up": 10, "down": 20}, "B": {"up": 11, "down": 21}, "C": {"up": 1, "down": 2}},
    "refused": [{"site": "C", "key": "x", "reason": "nan"}, {"site": "C", "key": "", "reason": ""}],
}


def test_a_line_becomes_figures_by_site_and_name() -> None:
    assert round_figures(LINE) == {
        "A": {
            "loss": 0.5,
            "steps": 7,
            "timings/steps": 1.5,
            "privacy/epsilon_replace": 2.5,
            "validation_dice/kidney": 0.6,
            "validation_dice/mean": 0.6,
            "bytes_up": 10,
            "bytes_down": 20,
            "refused": 0,
        },
        "B": {
            "loss": 1.0,
            "validation_dice/kidney": 0.2,
            "validation_dice/tumour": 0.2,
            "validation_dice/mean": 0.2,
            "bytes_up": 11,
            "bytes_down": 21,
            "refused": 0,
        },
        "C": {"bytes_up": 1, "bytes_down": 2, "refused": 2},
        ALL_SITES: {
            "loss": 0.75,
            "validation_dice/kidney": 0.4,
            "validation_dice/tumour": 0.2,
            "validation_dice/mean": 0.4,
            "seconds": 9.5,
            "aggregation_seconds": 0.2,
            "bytes_up": 22,
            "bytes_down": 43,
            "counted": 2,
            "excluded": 1,
            "missing": 1,
            "refused": 2,
        },
    }


def test_a_round_without_reports_has_counts_alone() -> None:
    empty = {**LINE, "sites": {}, "bytes": {}, "refused": [], "excluded": []}
    assert round_figures(empty) == {
        ALL_SITES: {
            "seconds": 9.5,
            "aggregation_seconds": 0.2,
            "bytes_up": 0,
            "bytes_down": 0,
            "counted": 0,
            "excluded": 0,
            "missing": 1,
            "refused": 0,
        }
    }
