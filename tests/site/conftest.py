"""One root for all kits of this folder: its RSA key takes longest to make."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit_files import Authority, write_kit

from flap_nvflare.site.kit import Kit


@pytest.fixture(scope="session")
def authority() -> Authority:
    """The federation's root."""
    return Authority.make()


@pytest.fixture(scope="session")
def stranger() -> Authority:
    """The root of another federation with the same name."""
    return Authority.make()


@pytest.fixture
def kit(tmp_path: Path, authority: Authority) -> Kit:
    """A kit of site A as it was unpacked."""
    return write_kit(tmp_path / "A", authority)
