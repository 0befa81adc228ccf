"""The end of a run: which models are scored, what is written, and the table that is printed."""

from __future__ import annotations

import io
import shutil
from typing import Any

import torch

from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.flare.job import ServerJob, keep_best
from flap_nvflare.flare.run import BEST, LAST


def models_to_score(job: ServerJob) -> dict[str, tuple[dict[str, torch.Tensor], UpdateSpec]]:
    """The adapters for the cross-site matrix: last, best, and each site's own last if asked."""
    rank = job.federation.rank
    files = {"last": (LAST, rank), "best": (BEST, rank)}
    if job.federation.cross_site == "all":
        for path in sorted((job.folder.path / "sites").glob("*.safetensors")):
            files[f"site_{path.stem}"] = (f"sites/{path.stem}", job.federation.rank_of(path.stem))
    found = {name: job.load_adapter(*where) for name, where in files.items()}
    return {name: loaded for name, loaded in found.items() if loaded is not None}


def write_results(job: ServerJob, scores: dict[str, dict[str, Any]]) -> str:
    """Chooses the best adapter, writes `cross_site.json` and returns the table to print.

    Args:
        job: the finished job.
        scores: by site, by model: the site's scores on its test cases, and for `last` on its
            validation cases, which alone decide whether `last` becomes `best`.
    """
    validation = {
        site: by_model["last"]["validation"]["dice"]["mean"]
        for site, by_model in scores.items()
        if by_model.get("last", {}).get("validation", {}).get("dice", {}).get("mean") is not None
    }
    if (
        keep_best(job, job.state, job.federation.rounds, validation)
        or job.folder.load(BEST, job.stored) is None
    ):
        if job.folder.load(BEST, job.stored) is None:  # no validation cases anywhere
            shutil.copyfile(job.folder.adapter_path(LAST), job.folder.adapter_path(BEST))
        for by_model in scores.values():
            by_model["best"] = {"test": by_model["last"]["test"]}
    matrix = {
        model: {
            site: scores[site][model]["test"] for site in sorted(scores) if model in scores[site]
        }
        for model in sorted({model for by_model in scores.values() for model in by_model})
    }
    job.folder.write_json("cross_site.json", matrix)
    job.write_description(scores)
    return result_table(job, matrix.get("best", {}))


def result_table(job: ServerJob, scores: dict[str, Any]) -> str:
    """Site by class: test Dice of the best adapter, and the bytes each site sent and got."""
    from rich.console import Console
    from rich.table import Table

    classes = (*job.federation.class_names, "mean")
    table = Table(title="Test Dice of the best adapter", title_justify="left")
    table.add_column("site")
    for name in (*classes, "cases", "sent", "received"):
        table.add_column(name, justify="right")
    for site, score in scores.items():
        table.add_row(
            site,
            *(_dice(score["dice"].get(name)) for name in classes),
            str(len(score["cases"])),
            _bytes(job.ledger.site_bytes(site, "up")),
            _bytes(job.ledger.site_bytes(site, "down")),
        )
    table.add_section()
    table.add_row(
        "all",
        *(_dice(_mean([score["dice"].get(name) for score in scores.values()])) for name in classes),
        str(sum(len(score["cases"]) for score in scores.values())),
        _bytes(job.ledger.total("up")),
        _bytes(job.ledger.total("down")),
    )
    text = io.StringIO()
    console = Console(file=text, width=100)
    if job.synthetic:
        console.print("The scans of this run are SYNTHETIC: a demonstration.")
    console.print(table)
    console.print(f"Results: {job.folder.path}", soft_wrap=True)
    return text.getvalue()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
