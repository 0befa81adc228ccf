"""What torchrun starts in the tests: rounds of several settings, each with its files by rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flap_nvflare import aggregation
from flap_nvflare.bundle.workflow import MULTI_GPU_CONFIG, TRAIN_CONFIG, build_work
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.errors import Stopped, TrainingError
from flap_nvflare.training.local_terms import Pull, Terms
from flap_nvflare.training.work import SiteWork

SETTINGS: dict[str, Any] = {
    "base": "random",
    "image_size": 32,
    "rank": 2,
    "rounds": 2,
    "batch_size": 4,
    "validation_fraction": 0.34,
    "threads": 1,
    "seed": 3,
}
CROSS_ENTROPY = {"dice_weight": 0.0, "batch_size": 3}
CASES: dict[str, dict[str, Any]] = {
    "cross_entropy": CROSS_ENTROPY,
    "again": CROSS_ENTROPY,
    "default_loss": {},
    "one_row": {"dice_weight": 0.0, "batch_size": 1},
    "full": {"method": "full"},
    "by_turns": {**CROSS_ENTROPY, "rule": "by_turns"},
}


def terms_of(work: SiteWork) -> Terms:
    """A pull towards zero, a shift, and the mean gradient of everything."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in work.adapter().items()}
    shift = {name: torch.full_like(tensor, 0.01) for name, tensor in work.adapter().items()}
    return Terms(Pull(0.02, "products", zeros), shift, list(zeros))


def make(root: Path, **changes: Any) -> SiteWork:
    federation = Federation.from_dict({**SETTINGS, **changes})
    return build_work(federation, Site("A", root, device="cpu"), (TRAIN_CONFIG, MULTI_GPU_CONFIG))


def main(root: Path, folder: Path) -> None:
    sys.path.append(str(Path(__file__).parents[1]))  # as pytest has it
    from rule_cards import stand_ins

    aggregation.RULES = stand_ins()
    told: dict[str, Any] = {}
    for name, changes in CASES.items():
        work = make(root, **changes)
        told[name] = [work.train(index).to_dict() for index in range(2)]
        told["threads"] = torch.get_num_threads()
        save_file(work.adapter(), folder / f"{name}_{work.ranks.rank}.safetensors")

    work = make(root, **CROSS_ENTROPY)
    work.terms.set(terms_of(work))
    work.train(0)
    save_file(work.adapter(), folder / f"terms_{work.ranks.rank}.safetensors")
    save_file(work.terms.mean(), folder / f"mean_{work.ranks.rank}.safetensors")

    work = make(root)
    steps: list[dict[str, Any]] = []
    try:
        work.train(0, lambda: work.ranks.rank == 1 and len(steps) > 0, steps.append)
    except Stopped as error:
        told["stopped"] = str(error)

    work = make(root)
    if work.ranks.rank == 1:
        nan = float("nan")
        work.load_adapter({name: tensor * nan for name, tensor in work.adapter().items()})
    try:
        work.train(0)
    except TrainingError as error:
        told["nan"] = str(error)
    (folder / f"told_{work.ranks.rank}.json").write_text(json.dumps(told), encoding="utf-8")
    work.ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
