"""A finished run of two sites on scans of a few small slices, trained in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scan_files import write_case

from flap_nvflare.adapter.update import save_update
from flap_nvflare.bundle.trained import BEST_FILE, LAST_FILE, SETTINGS
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.evaluation.models import RUN_FILE
from flap_nvflare.in_process import federate
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.site_round import SiteRound

SITES = ("A", "B")
SPLITS = ("train", "train", "train", "test", "test")


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites A and B, each with three training cases, of which one is held out, and two tests."""
    root = tmp_path_factory.mktemp("kits")
    lines = ["case_ids,site_ids,train_test_split,train_test_split_silo"]
    for number in range(len(SPLITS) * len(SITES)):
        site, split = SITES[number // len(SPLITS)], SPLITS[number % len(SPLITS)]
        lines.append(f"case_{number:05d},{site},{split},{split}_{site}")
        write_case(root, number, slices=4 + number % 2)
    (root / "thresholded_sites.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def federation() -> Federation:
    return Federation(
        image_size=32, rank=2, rounds=2, local_epochs=1, batch_size=4, validation_fraction=0.34
    )


@pytest.fixture(scope="session")
def run(scans: Path, federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that such a federation leaves; its best adapter is its last."""
    folder = tmp_path_factory.mktemp("run")
    memory = tmp_path_factory.mktemp("memory")
    sites = {
        name: SiteRound(build_work(federation, Site(name, scans, device="cpu")), memory / name)
        for name in SITES
    }
    state = federate(sites, federation).state
    spec = sites["A"].work.spec()
    said = {SETTINGS: json.dumps(federation.to_dict())}
    for name in (BEST_FILE, LAST_FILE):
        save_update(folder / name, state.tensors, spec, {"rounds": "2", **said})
    (folder / "sites").mkdir()
    for name, site in sites.items():
        tensors, own = site.last_adapter()
        save_update(folder / "sites" / f"{name}.safetensors", tensors, own, said)
    told = {"data": "sites' own", "federation": federation.to_dict(), "sites": list(SITES)}
    (folder / RUN_FILE).write_text(json.dumps({**told, "finished": True}), encoding="utf-8")
    return folder
