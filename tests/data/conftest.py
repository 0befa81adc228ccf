"""One synthetic site, written once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from flap_nvflare.data.phantom import write_phantom


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site D: three training and two test cases."""
    return write_phantom(tmp_path_factory.mktemp("phantom") / "kits", seed=0, sites=["D"])
