"""A small trained run that the tests of this room share."""

from __future__ import annotations

import pytest
from prediction_run import Run, train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("prediction"))
