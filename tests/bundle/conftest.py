"""Two sites with scans of a few small slices, and settings for seconds of training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from scan_files import write_sites

from flap_nvflare.settings import Federation, Site

# A numpy or scipy built for many cores must not start them in every subprocess.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SETTINGS: dict[str, Any] = {
    "base": "random",
    "image_size": 32,
    "rank": 2,
    "rounds": 2,
    "batch_size": 4,
    "validation_fraction": 0.34,
    "threads": 1,
    "seed": 3,
}


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites A and B, each with three training cases and one test case."""
    root = tmp_path_factory.mktemp("kits")
    write_sites(root, ("A", "B"))
    return root


@pytest.fixture
def federation() -> Federation:
    return Federation.from_dict(SETTINGS)


@pytest.fixture
def site(scans: Path) -> Site:
    return Site("A", scans, device="cpu")
