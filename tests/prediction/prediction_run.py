"""A site with small scans, trained for a round: what a federated run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from scan_files import write_sites

from flap_nvflare.bundle.alone import Alone
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.work import SiteWork

SETTINGS = {
    "image_size": 32,
    "rank": 2,
    "rounds": 1,
    "local_epochs": 1,
    "batch_size": 3,
    "validation_fraction": 0.0,
    "augment": False,
}


class Run(NamedTuple):
    """A finished run."""

    scans: Path
    adapter: Path
    work: SiteWork


def train(folder: Path, **changes: object) -> Run:
    scans = folder / "scans"
    write_sites(scans, ("A", "B"), slices=(7, 5))
    work = build_work(Federation.from_dict({**SETTINGS, **changes}), Site("A", scans, device="cpu"))
    Alone(work, folder / "run").train()
    return Run(scans, folder / "run" / "adapter_last.safetensors", work)
