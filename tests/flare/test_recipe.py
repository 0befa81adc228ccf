"""The recipe is the job folder as Python: the same components and the same defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_nvflare.flare.recipe import FlapRecipe, allow_components
from flap_nvflare.settings import Federation, SettingsError

JOB = Path(__file__).parents[2] / "jobs" / "fed_kits" / "app" / "config"


def paths(config: dict) -> set[str]:
    """Every component's path anywhere in a FLARE config."""
    found = set()
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, (dict, list)):
            found |= paths(value)
    if isinstance(config, dict) and "path" in config:
        found.add(config["path"])
    return found


def test_exports_the_job_without_code(tmp_path: Path) -> None:
    FlapRecipe().export(job_dir=str(tmp_path))
    assert not list(tmp_path.rglob("*.py"))
    for name in ("config_fed_server.json", "config_fed_client.json"):
        (exported,) = tmp_path.rglob(name)
        ours = paths(json.loads((JOB / name).read_text()))
        assert paths(json.loads(exported.read_text())) == ours
    (server,) = tmp_path.rglob("config_fed_server.json")
    (workflow,) = json.loads(server.read_text())["workflows"]
    assert Federation.from_dict(workflow["args"]["federation"]) == Federation()


def test_a_bad_setting_stops_before_anything_runs() -> None:
    with pytest.raises(SettingsError, match="rank"):
        FlapRecipe(rank=0)


def test_the_allow_list_keeps_flares_own_entries(tmp_path: Path) -> None:
    allow_components(tmp_path)
    allow_components(tmp_path)
    allowed = json.loads((tmp_path / "resources.json").read_text())["class_allow_list"]
    assert allowed.count("flap_nvflare.") == 1
    assert len(allowed) > 1
