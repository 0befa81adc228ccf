"""The bench of a whole CT: both ways give one mask, and one of them runs each slice five times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flap_nvflare.bench import prediction
from flap_nvflare.bench.prediction import Figures, by_stacks, measure, table, trained_of, write_scan
from flap_nvflare.data.scan import open_scan
from flap_nvflare.data.window import MEAN_KITS_WINDOW
from flap_nvflare.prediction.predictor import Predictor


def test_stacks_of_five_give_the_same_mask_for_five_times_the_work(tmp_path: Path) -> None:
    scan = open_scan(write_scan(tmp_path / "scan.nii.gz", 7, 48))
    trained = trained_of("vit_t")
    predictor = Predictor(trained, MEAN_KITS_WINDOW, "cpu")
    images: list[int] = []
    trained.network.register_forward_pre_hook(lambda module, given: images.append(len(given[0])))
    once = predictor.mask(scan)
    assert sum(images) == 7
    images.clear()
    stacks = by_stacks(trained.network, trained.federation, MEAN_KITS_WINDOW, scan)
    assert sum(images) == 5 * 7
    assert np.array_equal(once, stacks)
    assert len(np.unique(once)) > 1


def test_a_way_is_measured_with_its_mask(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "scan.nii.gz", 3, 32)
    once, paper = (measure("vit_t", way, path) for way in ("once", "paper's way"))
    assert (once.images, paper.images) == (3, 15)
    assert once.peak_bytes >= once.base_bytes > 0
    assert once.cpu_seconds > 0
    masks = [np.load(tmp_path / f"vit_t {way}.npy") for way in ("once", "paper's way")]
    # segment_anything's own encoder rounds otherwise.
    assert (masks[0] != masks[1]).mean() < 0.01


def test_the_table_compares_with_the_first_way() -> None:
    once = Figures("vit_t", "once", 200, 20.0, 10.0, 800_000_000, 500_000_000)
    five = Figures("vit_t", "five times", 1000, 90.0, 45.0, 700_000_000, 500_000_000, 3)
    lines = table([once, five]).splitlines()
    assert lines[2:] == [
        "| vit_t | once | 200 | 20.0 | 0.100 | 10.0 | 1.00 | 800 | 0 |",
        "| vit_t | five times | 1000 | 90.0 | 0.450 | 45.0 | 4.50 | 700 | 3 |",
    ]


def test_networks_are_those_of_demo_and_paper() -> None:
    assert prediction.NETWORKS["vit_t"].image_size == 96
    paper = prediction.NETWORKS["vit_b"]
    assert (paper.arch, paper.image_size, paper.rank) == ("vit_b", 224, 32)
    factors = [p for n, p in trained_of("vit_t").network.named_parameters() if "lora_b" in n]
    assert all(bool(torch.any(factor != 0)) for factor in factors)
