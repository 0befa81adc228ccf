"""Installed packages against what is asked for, with a list of packages made up for the test."""

from __future__ import annotations

import importlib.metadata as metadata

import pytest

from flap_nvflare.site import doctor_packages
from flap_nvflare.site.doctor_packages import check_packages, check_python

VERSIONS = {"ours": "1.0", "torch": "2.13.0+cpu", "monai": "1.6.1", "numpy": "2.0", "fire": "0.7"}
NEEDS = {
    "ours": ["torch<2.14,>=2.6", "monai[fire]<1.7", 'pytest; extra == "test"'],
    "torch": [],
    "monai": ["numpy<3", 'fire; extra == "fire"', 'itk>=5; extra == "all"'],
    "numpy": [],
    "fire": ["monai"],  # round in a circle
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by name; a test changes them."""
    found = dict(VERSIONS)

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(doctor_packages.metadata, "version", version)
    monkeypatch.setattr(doctor_packages.metadata, "requires", NEEDS.get)
    return found


def test_all_there(installed: dict[str, str]) -> None:
    (finding,) = check_packages("ours")
    assert finding.ok is True
    assert finding.found == "torch 2.13.0+cpu, monai 1.6.1"


def test_one_too_old_and_one_missing(installed: dict[str, str]) -> None:
    installed["torch"] = "2.5.1"
    del installed["fire"]  # by an extra of monai's
    fire, torch = check_packages("ours")
    assert (fire.name, fire.ok, fire.found) == (
        "package fire",
        False,
        "not installed; monai asks for fire",
    )
    assert torch.found == "2.5.1; ours asks for torch<2.14,>=2.6"
    assert torch.mend == "in FLARE's Python: pip install 'torch<2.14,>=2.6'"


def test_a_package_that_another_one_needs(installed: dict[str, str]) -> None:
    installed["numpy"] = "3.1"
    (numpy,) = check_packages("ours")
    assert numpy.found == "3.1; monai asks for numpy<3"


def test_this_python_and_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check_python()
    assert finding.ok is True
    monkeypatch.setattr(doctor_packages.platform, "python_version", lambda: "3.9.18")
    (finding,) = check_python()
    assert finding.ok is False
    assert "3.9.18" in finding.found


def test_a_package_that_is_not_installed() -> None:
    for check in (check_python, check_packages):
        (finding,) = check("no_such_package_here")
        assert finding.ok is False
        assert "pip install" in finding.mend
