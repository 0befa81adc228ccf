"""What a new process of a site, or of the server, does not import: the simulator starts many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules}:\n    importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "torch" in loaded
    assert not {*NOT_BEFORE_A_TASK} & {*loaded}
