"""The three job folders: they differ in nothing but what they must, and name their own runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from paths import TRAVERSALS

from flap_nvflare.data.phantoms import Phantoms, phantom_sites
from flap_nvflare.flare.context import job_name
from flap_nvflare.settings import Federation, SettingsError

JOBS = Path(__file__).parents[2] / "jobs"
CLASSES = {"kits": None, "ixi": ["brain"], "prostate": ["prostate"]}
# What a job must say for itself.
OWN = {"meta.json", "app/config/federation.yaml"}


def files(kind: str) -> dict[str, Path]:
    job = JOBS / f"fed_{kind}"
    return {str(path.relative_to(job)): path for path in job.rglob("*") if path.is_file()}


def settings(kind: str) -> dict:
    return yaml.safe_load(files(kind)["app/config/federation.yaml"].read_text(encoding="utf-8"))


def test_there_is_a_job_for_every_kind_of_phantoms() -> None:
    assert sorted(path.name for path in JOBS.iterdir()) == [
        f"fed_{kind}" for kind in sorted(CLASSES)
    ]


@pytest.mark.parametrize("kind", ["ixi", "prostate"])
def test_a_job_differs_in_nothing_but_its_name_its_sites_and_its_classes(kind: str) -> None:
    """FLARE signs what is submitted, and signs no links: so equal files, not one."""
    ours, first = files(kind), files("kits")
    assert set(ours) == set(first)
    assert not any(path.is_symlink() for path in ours.values())
    for name in set(first) - OWN:
        assert ours[name].read_bytes() == first[name].read_bytes(), name
    meta, of_first = (json.loads(one["meta.json"].read_text()) for one in (ours, first))
    assert {**meta, "name": "", "deploy_map": ""} == {**of_first, "name": "", "deploy_map": ""}
    assert {**settings(kind), "class_names": 0, "grey_values": 0} == {
        **settings("kits"),
        "class_names": 0,
        "grey_values": 0,
    }
    assert settings(kind)["class_names"] == CLASSES[kind]
    assert settings(kind)["grey_values"] == "scan"  # MR has no units


@pytest.mark.parametrize("kind", CLASSES)
def test_a_job_is_sent_to_the_sites_whose_scans_the_demo_draws(kind: str) -> None:
    meta = json.loads(files(kind)["meta.json"].read_text())
    assert meta["name"] == f"fed_{kind}"
    sites = phantom_sites(Phantoms(kind=kind))
    assert meta["deploy_map"] == {"app": ["server", *sites], "simulator": []}


@pytest.mark.parametrize(("kind", "classes"), [("kits", 2), ("ixi", 1), ("prostate", 1)])
def test_with_sams_weights_a_job_is_the_papers(kind: str, classes: int) -> None:
    """So many classes that `flap-nvflare count` gives the paper's parameters, as tested there."""
    values = settings(kind)
    known = {"FLAP_SAM_CHECKPOINT": "sam_vit_b_01ec64.pth"}
    federation = Federation.of_profile(values.pop("profile"), values, known)
    ours = (federation.arch, federation.image_size, federation.classes, federation.rank)
    assert (*ours, federation.method) == ("vit_b", 224, classes, 32, "flap")


def context(folder: Path) -> FLContext:
    workspace = SimpleNamespace(get_job_meta_path=lambda job: str(folder / "meta.json"))
    fl_ctx = FLContext()
    engine = SimpleNamespace(get_workspace=lambda: workspace)
    fl_ctx.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
    return fl_ctx


def test_runs_are_named_after_the_job() -> None:
    assert job_name(context(JOBS / "fed_prostate")) == "fed_prostate"


@pytest.mark.parametrize("name", [*TRAVERSALS, None, 7], ids=str)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"name": name}))
    with pytest.raises(SettingsError, match="name of the runs"):
        job_name(context(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_job_without_a_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(SettingsError, match="names no job"):
        job_name(context(tmp_path))


@pytest.mark.slow
def test_a_federation_of_brains_runs_to_its_end_on_its_own_demo(simulation: Callable) -> None:
    changes = {"rounds": 1, "image_size": 32, "local_epochs": 1, "cross_site": "global"}
    brains = simulation("brains", sites=("IOP",), changes=changes, name="fed_ixi")
    run = brains.run()
    (line,) = brains.lines(run)
    assert line["sites"]["IOP"]["synthetic"]
    scores = json.loads((run / "cross_site.json").read_text())["last"]
    assert scores["IOP"]["class_names"] == ["brain"]
    settings = json.loads((run / "run.json").read_text())["federation"]
    assert (settings["class_names"], settings["grey_values"]) == (["brain"], "scan")
