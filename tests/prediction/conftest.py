"""Small trained runs that the tests of this room share."""

from __future__ import annotations

import pytest
from prediction_run import Run, train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("prediction"))


@pytest.fixture(scope="session")
def run_by_scan(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of scans without a unit: no window is usual for its classes, and none is needed."""
    folder = tmp_path_factory.mktemp("prediction_by_scan")
    return train(folder, grey_values="scan", class_names=["gland", "lesion"])
