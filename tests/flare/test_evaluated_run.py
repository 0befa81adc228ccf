"""A run of FLARE's simulator, evaluated: what its sites have found is found again."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flap_nvflare.cli import main


@pytest.mark.slow
def test_an_evaluation_finds_what_the_sites_of_the_run_have_found(simulation: Callable) -> None:
    changes = {"rounds": 2, "image_size": 32, "local_epochs": 1, "cross_site": "all"}
    simulated = simulation("evaluated", changes=changes)
    run = simulated.run()
    arguments = ["evaluate", str(run), "--data-root", str(simulated.home / "demo_kits")]
    assert main([*arguments, "--leave-one-out", "B", "--pictures", "0"]) == 0
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    matrix = json.loads((run / "cross_site.json").read_text(encoding="utf-8"))
    assert found["synthetic"]
    names = {"federated": "best", "site_A": "site_A", "site_B": "site_B"}
    if "last" in found["models"]:
        names["last"] = "last"
    for name, theirs in names.items():
        for site in ("A", "B"):
            ours = [case["dice"] for case in found["models"][name]["sites"][site]["cases"]]
            assert ours == [case["dice"] for case in matrix[theirs][site]["cases"]]
            assert (
                found["models"][name]["sites"][site]["left_out"]
                == (matrix[theirs][site]["left_out"])
            )
    unseen = found["models"]["without_B"]
    assert (unseen["kind"], unseen["sites"]["B"]["seen"]) == ("left_out", False)
