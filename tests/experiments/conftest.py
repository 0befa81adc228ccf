"""A grid so small that it trains in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from scan_files import write_sites

GRID = """
about: How many numbers make how much Dice?
data: {{root: {root}}}
settings: {{base: random, image_size: 32, rank: 2, rounds: 1, batch_size: 4}}
vary: {{method: [flap, partial_decoder]}}
seeds: [0]
show: {{columns: [parameters, classes, worst site, up, of full]}}
"""


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    write_sites(folder, ("A", "B"))
    return folder


@pytest.fixture
def grid_file(tmp_path: Path, scans: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(GRID.format(root=scans))
    return path
