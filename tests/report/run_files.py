"""Run folders for the tests of the report, written as the server and `evaluate` write them."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

CLASSES = ("kidney", "tumour")
FULL_PARAMETERS = 1_000_000
UP, DOWN = 40_000, 80_000  # bytes of a message


def site_dice(site: int, round_index: int) -> dict[str, float | None]:
    """Validation Dice that grows with the rounds and falls with the site's number."""
    kidney = round(0.8 - 0.4 / (round_index + 1) - 0.01 * (site % 10), 6)
    return {"kidney": kidney, "tumour": None, "mean": kidney}


def round_line(index: int, sites: list[str], **changes: Any) -> dict[str, Any]:
    """A line of `rounds.jsonl`."""
    reports = {
        site: {
            "loss": 0.6 / (index + 1) + 0.01 * place,
            "steps": 12,
            "slices": 80,
            "cases": 3,
            "seconds": 10.0 + place % 7,
            "synthetic": True,
            "timings": {"open": 0.5, "evaluate": 1.5, "read": 1.0, "steps": 6.5, "save": 0.5},
            "dice": site_dice(place, index) if index else {},
            "bytes_up": UP,
            "bytes_down": DOWN,
        }
        for place, site in enumerate(sites)
    }
    return {
        "round": index,
        "seconds": 20.0,
        "validation_dice_received": 0.4 if index else None,
        "aggregation_seconds": 0.02,
        "aggregation_error": 0.02 / (index + 1),
        "excluded": [],
        "taking_part": sites,
        "sites": reports,
        "missing": [],
        "bytes": {site: {"up": UP, "down": DOWN} for site in sites},
        "refused": [],
        **changes,
    }


def score(site: str, dice: float, cases: int = 2) -> dict[str, Any]:
    """A site's scores as `SiteScore.to_dict` gives them."""
    return {
        "site": site,
        "split": "test",
        "class_names": list(CLASSES),
        "dice": {"kidney": dice, "tumour": 0.0, "mean": dice / 2},
        "dice_paper": {"kidney": dice, "tumour": 0.5, "mean": dice / 2 + 0.25},
        "left_out": {"kidney": 0, "tumour": 1},
        "seconds": 1.0,
        "cases": [
            {"case": str(n + 1), "dice": [dice, 0.0], "dice_paper": [dice, 0.0]}
            for n in range(cases)
        ],
    }


def write_run(
    folder: Path,
    sites: list[str],
    rounds: int = 4,
    finished: bool = True,
    lines: list[dict[str, Any]] | None = None,
    settings: dict[str, Any] | None = None,
    **description: Any,
) -> Path:
    """A federation's run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [round_line(index, sites) for index in range(rounds)] if lines is None else lines
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rounds.jsonl").write_text(text, encoding="utf-8")
    federation = {
        "arch": "vit_t", "image_size": 96, "class_names": list(CLASSES), "method": "flap",
        "rank": 8, "rule": "svd", "personal": "none", "encryption": "none", "rounds": rounds,
        "upload": [], "seed": 0, **(settings or {}),
    }  # fmt: skip
    last = {site: site_dice(place, rounds) for place, site in enumerate(sites)}
    values = {
        "run": "fed_kits/20261128-013327",
        "data": "synthetic",
        "seed": 0,
        "federation": federation,
        "sites": sites,
        "base_sha256": "c7" * 32,
        "parameters": 10_000,
        "full_parameters": FULL_PARAMETERS,
        "bytes": {"up": rounds * len(sites) * UP + 7, "down": rounds * len(sites) * DOWN},
        "rounds_finished": rounds if finished else 0,
        "finished": finished,
        "validation_dice_last": last if finished else {},
        "versions": {"flap_nvflare": "0.1.0", "torch": "2.13.0"},
        **description,
    }
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    if finished:
        models = ["last", "best", *(f"site_{site}" for site in sites)]
        matrix = {
            model: {
                site: score(site, 0.6 + 0.01 * (place % 20) + 0.002 * row)
                for place, site in enumerate(sites)
            }
            for row, model in enumerate(models)
        }
        (folder / "cross_site.json").write_text(json.dumps(matrix), encoding="utf-8")
    return folder


def spread(mean: float, worst_site: str) -> dict[str, Any]:
    """A summary's figure with an interval of five hundredths around it."""
    return {
        "mean": mean, "low": mean - 0.05, "high": mean + 0.05, "worst_site": worst_site,
        "worst": mean - 0.1, "left_out": 1,
    }  # fmt: skip


def write_evaluation(folder: Path, sites: list[str], pictures: int = 1, **changes: Any) -> None:
    """`evaluation.json`: the federated model, two local ones, a pooled one, one without a site."""

    def model(kind: str, trained_on: list[str], dice: float) -> dict[str, Any]:
        by_class = {"kidney": dice + 0.2, "tumour": dice - 0.2, "mean": dice}
        return {
            "kind": kind,
            "trained_on": trained_on,
            "adapter": "adapter_best.safetensors",
            "sha256": "ab" * 32,
            "sites": {
                site: {
                    **score(site, dice),
                    "nsd": {"kidney": 0.7, "tumour": 0.1, "mean": 0.4},
                    "hd95": {"kidney": 12.25, "tumour": None, "mean": 12.25},
                    "seen": site in trained_on,
                }
                for site in sites
            },
            "summary": {
                "dice": {name: spread(one, sites[-1]) for name, one in by_class.items()},
                "nsd": {name: spread(one - 0.05, sites[-1]) for name, one in by_class.items()},
                "hd95": {name: spread(12.25, sites[0]) for name in by_class},
                "dice_paper": {name: spread(one + 0.1, sites[0]) for name, one in by_class.items()},
            },
        }

    (folder / "pictures").mkdir(exist_ok=True)
    listed = []
    for number in range(pictures):
        file = f"pictures/{number}.png"
        (folder / file).write_bytes(png(360, 120))
        listed.append(
            {
                "file": file,
                "site": sites[0],
                "case": "case_1",
                "slice": number,
                "model": "federated",
            }
        )
    values = {
        "format": "flap_nvflare.evaluation.1",
        "synthetic": True,
        "class_names": list(CLASSES),
        "split": "test",
        "tolerance_mm": 2.0,
        "bootstrap": {"samples": 2000, "seed": 0, "level": 0.95},
        "models": {
            "federated": model("federated", sites, 0.6),
            **{f"local_{site}": model("local", [site], 0.5) for site in sites[:2]},
            "pooled": model("pooled", sites, 0.63),
            f"without_{sites[-1]}": model("left_out", sites[:-1], 0.58),
        },
        "local_only": {"summary": {"dice": {"mean": spread(0.47, sites[0])}}},
        "notes": ["Scores are of the adapter of round 3."],
        "collaborative_gain": {
            "reference": "local",
            "model": "federated",
            "sites": {site: 0.03 - 0.02 * place for place, site in enumerate(sites)},
            "mean": 0.012,
        },
        "pictures": listed,
        **changes,
    }
    (folder / "evaluation.json").write_text(json.dumps(values), encoding="utf-8")


def write_alone(folder: Path, rounds: int = 3, finished: bool = True) -> Path:
    """The folder of a site that trained by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"round": index, "loss": 0.5 - 0.1 * index, "steps": 4, "slices": 8, "cases": 2,
         "seconds": 3.0, "dice": site_dice(0, index)}
        for index in range(rounds)
    ]  # fmt: skip
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        values = {
            "site": "A",
            "adapter": "last",
            "federation": {"class_names": list(CLASSES), "rounds": rounds, "method": "flap"},
            "base_sha256": "9d" * 32,
            "validation": score("A", 0.5),
            "test": score("A", 0.6),
        }
        (folder / "scores.json").write_text(json.dumps(values))
    return folder


def png(width: int, height: int) -> bytes:
    """A grey PNG of that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\x60" * width) * height)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
