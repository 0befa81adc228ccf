"""Prediction of a whole CT: `python -m flap_nvflare.bench.prediction`.

`predict` runs every slice once. The paper's code takes stacks of five slices and flattens them to
five images that know nothing of each other, so every slice is run five times for the same answer;
here a stack is made around each slice and its middle mask is kept. All ways read the same file,
prepare slices alike and use the same weights, each in a process of its own, one after the other:

    once          as `predict` does
    five times    the same network, a stack of five for each slice
    paper's way   stacks of five through segment_anything's own encoder, as the paper's code has it

Networks: the small SAM of the package as the demo runs it, and ViT-B at 224 pixels with random
weights, whose masks mean nothing but take the same time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from flap_nvflare.bench.timing import process_bytes
from flap_nvflare.settings import PROFILES, Federation

if TYPE_CHECKING:
    from flap_nvflare.bundle.trained import Trained
    from flap_nvflare.data.scan import Scan
    from flap_nvflare.data.window import Window

WAYS = ("once", "five times", "paper's way")
STACK = 5
NETWORKS = {
    "vit_t": Federation(),
    "vit_b": Federation.from_dict({**PROFILES["paper"], "base": "random", "precision": "fp32"}),
}


@dataclass(frozen=True)
class Figures:
    """What one way took for one scan.

    Attributes:
        network: name of the backbone.
        way: one of `WAYS`.
        images: slices that went through the network.
        seconds: from opening the file to the mask in memory.
        cpu_seconds: the processors' time of it, which other work on the machine lengthens less.
        peak_bytes: the process's peak, and `base_bytes` what it held before, with network and
            libraries.
        differing: voxels whose class is not that of the network's first way; segment_anything's
            encoder rounds otherwise than ours.
    """

    network: str
    way: str
    images: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    base_bytes: int
    differing: int = 0


def write_scan(path: Path, slices: int, side: int) -> Path:
    """A CT of noise around a bright ball, (side, side, slices) int16."""
    import nibabel as nib

    draw = np.random.default_rng(0)
    rows, columns = (axis - side / 2 for axis in np.ogrid[:side, :side])
    voxels = np.empty((side, side, slices), np.int16, order="F")
    for number in range(slices):
        away = rows**2 + columns**2 + (side / slices * (number - slices / 2)) ** 2
        body = np.where(away < (side / 4) ** 2, 120, -80)
        voxels[:, :, number] = body + draw.normal(0, 20, body.shape)
    nib.save(nib.Nifti1Image(voxels, np.diag([-0.8, -0.8, 1.0, 1.0])), path)
    return path


def trained_of(network: str) -> Trained:
    """A network with an adapter of random numbers."""
    from flap_nvflare.adapter.update import UpdateSpec
    from flap_nvflare.bundle.builders import make_network
    from flap_nvflare.bundle.trained import Trained
    from flap_nvflare.settings import Site

    settings = NETWORKS[network]
    model = make_network(settings, Site("bench", Path()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("lora_b"):
                parameter.normal_(std=0.01, generator=generator)
    spec = UpdateSpec(settings.method, settings.rank, model.base_sha256, {})
    return Trained(model.eval(), settings, spec, Path(), {})


def by_stacks(
    network: torch.nn.Module, settings: Federation, window: Window, scan: Scan
) -> np.ndarray:
    """The mask (S, H, W) with a stack of five slices for each, the ends repeated."""
    from flap_nvflare.data.prepared import prepare_images
    from flap_nvflare.training.volume_scorer import native_masks

    count, *size = scan.shape
    mask = np.empty(scan.shape, np.uint8)
    with torch.inference_mode():
        for place in range(count):
            around = np.clip(np.arange(STACK) + place - STACK // 2, 0, count - 1)
            slab = scan.slab(int(around[0]), int(around[-1]) + 1)[around - around[0]]
            images = prepare_images(slab, window, settings.image_size)
            logits = network(images[:, None].expand(-1, 3, -1, -1))
            mask[place] = native_masks(logits[STACK // 2][None], tuple(size))[0]
    return mask


def measure(network: str, way: str, path: Path) -> Figures:
    """Predicts the scan in one way, in this process, on the CPU."""
    from flap_nvflare.bench.reference import straightforward
    from flap_nvflare.data.scan import open_scan
    from flap_nvflare.data.window import MEAN_KITS_WINDOW
    from flap_nvflare.prediction.predictor import Predictor

    trained, window = trained_of(network), MEAN_KITS_WINDOW
    settings, model = trained.federation, trained.segmenter
    if way == "paper's way":
        model = straightforward(model, settings.arch, settings.method, settings.rank).eval()
    else:
        predictor = Predictor(trained, window, "cpu")  # lays the weights out for the processor
    images: list[int] = []
    model.register_forward_pre_hook(lambda module, given: images.append(len(given[0])))
    base = process_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    started, cpu_started = time.perf_counter(), time.process_time()
    scan = open_scan(path)
    mask = predictor.mask(scan) if way == "once" else by_stacks(model, settings, window, scan)
    figures = Figures(
        network=network,
        way=way,
        images=sum(images),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        peak_bytes=process_bytes("VmHWM"),
        base_bytes=base,
    )
    np.save(_mask_file(path, network, way), mask)
    return figures


def _mask_file(scan: Path, network: str, way: str) -> Path:
    return scan.with_name(f"{network} {way}.npy")


def run(networks: Sequence[str], ways: Sequence[str], slices: int, side: int) -> list[Figures]:
    """All ways for all networks, each in a process of its own, one after the other."""
    found = []
    with TemporaryDirectory() as folder:
        path = write_scan(Path(folder) / "scan.nii.gz", slices, side)
        spawn = multiprocessing.get_context("spawn")
        for network in networks:
            for way in ways:
                with ProcessPoolExecutor(1, mp_context=spawn) as process:
                    figures = process.submit(measure, network, way, path).result()
                first, mask = (
                    np.load(_mask_file(path, network, one), mmap_mode="r") for one in (ways[0], way)
                )
                differing = sum(int((a != b).sum()) for a, b in zip(first, mask, strict=True))
                found.append(dataclasses.replace(figures, differing=differing))
                print(found[-1], file=sys.stderr, flush=True)
    return found


def table(found: Sequence[Figures]) -> str:
    """The figures as Markdown, each network's against its first way."""
    lines = [
        "| network | way | slices run | s | s a slice | CPU s | times | peak MB | voxels differ |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        first = next(other for other in found if other.network == one.network)
        slices = first.images
        lines.append(
            f"| {one.network} | {one.way} | {one.images} | {one.seconds:.1f} | "
            f"{one.seconds / slices:.3f} | {one.cpu_seconds:.1f} | "
            f"{one.cpu_seconds / first.cpu_seconds:.2f} | "
            f"{one.peak_bytes / 1e6:.0f} | {one.differing} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or with --json the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.bench.prediction", description="Prediction of a whole CT."
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--slices", type=int, default=200, help="of the CT (default 200)")
    parser.add_argument("--side", type=int, default=512, help="its pixels (default 512)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    found = run(options.networks, options.ways, options.slices, options.side)
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    else:
        print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
