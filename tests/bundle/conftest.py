"""Two sites with scans of a few small slices, and settings for seconds of training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rank_rounds import SETTINGS
from scan_files import write_sites

from flap_nvflare.settings import Federation, Site

# A numpy or scipy built for many cores must not start them in every subprocess.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites A and B, each with three training cases and one test case."""
    root = tmp_path_factory.mktemp("kits")
    write_sites(root, ("A", "B"))
    return root


@pytest.fixture(scope="session")
def federation() -> Federation:
    return Federation.from_dict(SETTINGS)


@pytest.fixture(scope="session")
def site(scans: Path) -> Site:
    return Site("A", scans, device="cpu")
