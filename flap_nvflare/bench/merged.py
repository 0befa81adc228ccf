"""A merged network against base and adapter: the same masks, and what the adapter costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flap_nvflare.bench import steps
from flap_nvflare.bench.reference import build_ours
from flap_nvflare.bench.timing import peak_bytes
from flap_nvflare.sam.merged import merge
from flap_nvflare.sam.packed import available
from flap_nvflare.sam.runtime import Runtime, place
from flap_nvflare.sam.segmenter import Segmenter
from flap_nvflare.settings import Federation, Site

if TYPE_CHECKING:
    from flap_nvflare.data.prepared import Prepared
    from flap_nvflare.training.scores import CaseScore

WAYS = ("merged", "adapter")


def make_prediction(
    way: str, size: int, batch: int, bf16: bool, device: torch.device
) -> steps.Prediction:
    """A batch through the merged network, or through base and adapter."""
    network = build_ours(steps.ARCH, size, steps.CLASSES, "flap", steps.RANK)
    network.requires_grad_(False)
    if way == "merged":
        network = merge(network)
    image, _ = steps.images(size, batch, device)
    runtime = Runtime(device, bf16=bf16, packed=available(device, bf16))
    return steps.Prediction(place(network, runtime), runtime, image)


def peak(way: str, size: int, batch: int, bf16: bool, device: torch.device) -> int:
    """Peak of memory of such a prediction above its network, in bytes."""
    return peak_bytes(make_prediction(way, size, batch, bf16, device), device)


@dataclass(frozen=True)
class Scores:
    """Masks of both networks on the same test cases.

    Attributes:
        dice: the site's mean Dice by way.
        voxels: voxels of all cases.
        different: those whose class is not the same.
    """

    dice: dict[str, float]
    voxels: int
    different: int


def demo_scores() -> Scores:
    """On the demo's synthetic test cases of site A, after a round of training there."""
    from flap_nvflare.data.phantom import write_phantom

    with TemporaryDirectory() as folder:
        write_phantom(folder, sites=["A"])
        return scores(Federation(rounds=1), Site("A", Path(folder), device="cpu"))


def scores(federation: Federation, site: Site) -> Scores:
    """Trains the site's rounds and scores its test cases with both networks."""
    from flap_nvflare.bundle.trained import sam_only
    from flap_nvflare.bundle.workflow import build_work
    from flap_nvflare.training.metrics import score_case
    from flap_nvflare.training.scores import SiteScore

    work = build_work(federation, site)
    for index in range(federation.rounds):
        work.train(index)
    adapted = sam_only(work.network.eval(), "bench")
    networks = {"merged": merge(adapted), "adapter": adapted}
    found: dict[str, list[CaseScore]] = {way: [] for way in WAYS}
    voxels = different = 0
    for case in work.data.prepared("test"):
        label = case.native_label()
        masks = {way: masks_of(network, case, federation) for way, network in networks.items()}
        for way, mask in masks.items():
            score = score_case(case.name, mask, label, federation.classes, case.spacing)
            found[way].append(score)
        voxels += label.numel()
        different += int((masks["merged"] != masks["adapter"]).sum())
    named = (site.name, "test", federation.class_names)
    sites = {way: SiteScore(*named, tuple(cases), 0) for way, cases in found.items()}
    return Scores({way: one.dice or 0.0 for way, one in sites.items()}, voxels, different)


def masks_of(network: Segmenter, case: Prepared, federation: Federation) -> Tensor:
    """The network's class indices of a case at native resolution, (S, H, W) uint8."""
    from flap_nvflare.data.slices import volume_batches
    from flap_nvflare.training.volume_scorer import native_masks

    batches = volume_batches(case, federation.channels, federation.batch_size)
    with torch.inference_mode():
        return torch.cat([native_masks(network(image), case.shape[1:]) for image, _ in batches])
