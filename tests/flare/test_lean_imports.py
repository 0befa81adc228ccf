"""What a new process of a site, or of the server, does not import: the simulator starts many."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from flap_nvflare.flare.forked_simulator import MODULES

CONFIG = Path(__file__).parents[2] / "jobs" / "fed_kits" / "app" / "config"
# Heavy, and of use only to a site's work, to a setting that most jobs do not have, or to a reader.
NOT_BEFORE_A_TASK = [
    "accelerate",
    "dp_accounting",
    "ignite",
    "jinja2",
    "matplotlib",
    "mlflow",
    "monai",
    "nibabel",
    "pydicom",
    "scipy",
    "sympy",
    "tenseal",
    "tensorboard",
    "transformers",
]


def test_a_jobs_components_load_nothing_of_a_sites_work() -> None:
    names = set()
    for member in ("server", "client"):
        text = (CONFIG / f"config_fed_{member}.json").read_text(encoding="utf-8")
        json.loads(text, object_hook=lambda found: names.add(found.get("path", "")) or found)
    modules = sorted(name.rpartition(".")[0] for name in names if name)
    assert "flap_nvflare.flare.executor" in modules
    assert "flap_nvflare.flare.controller" in modules
    loaded = _loaded(modules)
    assert "torch" in loaded
    assert not {*NOT_BEFORE_A_TASK} & loaded


def test_what_is_imported_before_a_fork_is_a_sites_work_and_nothing_of_flare() -> None:
    loaded = _loaded(MODULES)
    assert {"torch", "monai", "ignite"} <= loaded
    assert "nvflare" not in loaded


def _loaded(modules: Iterable[str]) -> set[str]:
    """Names of the packages that a new process holds once it has imported the modules."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {[*modules]}:\n    importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))
