"""Names that become paths at the server: of runs, of adapters, of what to go on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvflare.apis.fl_context import FLContext
from paths import TRAVERSALS
from watched import watched

from flap_nvflare.flare.context import run_folder
from flap_nvflare.flare.names import plain_name
from flap_nvflare.flare.recipe import FlapRecipe
from flap_nvflare.flare.run import BEST, LAST, RunFolder
from flap_nvflare.settings import SettingsError

NUMBERS = range(len(TRAVERSALS))
# What an environment variable can hold; without a value nothing is gone on with.
HOSTILE = [name for name in TRAVERSALS if name and "\0" not in name]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FLAP_RESUME", raising=False)
    return tmp_path


def never(folder: Path) -> bool:
    """No run was broken off."""
    return False


@pytest.mark.parametrize("name", TRAVERSALS, ids=NUMBERS)
def test_no_name_of_runs_leads_out(name: str, place: Path) -> None:
    with watched() as seen:
        with pytest.raises(SettingsError, match="name of the runs"):
            plain_name(name)
        with pytest.raises(SettingsError):
            run_folder(FLContext(), name, "auto", never)
        with pytest.raises(SettingsError, match="name of the runs"):
            FlapRecipe(name=name)
    assert not seen.written
    assert not list(place.iterdir())


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_run_to_go_on_with_lies_elsewhere(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (place / "secret", place / "home" / "runs" / "secret"):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
    monkeypatch.setenv("FLAP_RESUME", name)
    with watched() as seen, pytest.raises(SettingsError, match="no such run"):
        run_folder(FLContext(), "fed_kits", "auto", never)
    assert not seen.written


@pytest.mark.parametrize("name", TRAVERSALS, ids=NUMBERS)
def test_no_adapter_lies_outside_its_run(name: str, place: Path) -> None:
    for whole in (name, f"sites/{name}", f"{name}/{LAST}", f"sites/../{name}"):
        with pytest.raises(ValueError, match="would lie outside"):
            RunFolder(place).adapter_path(whole)


def test_plain_names_are_taken(place: Path) -> None:
    folder = RunFolder(place)
    assert folder.adapter_path(BEST) == place / "adapter_best.safetensors"
    for site in ("A", "site-1", "hospital.a.org", "Klinik für Urologie (2)"):
        assert folder.adapter_path(f"sites/{site}") == place / "sites" / f"{site}.safetensors"
    assert (
        run_folder(FLContext(), "fed_kits", "auto", never)[0].parent
        == place / "home" / "runs" / "fed_kits"
    )
