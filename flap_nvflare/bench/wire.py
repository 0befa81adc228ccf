"""Bytes of a coded update by its stages: `python -m flap_nvflare.bench.wire`.

For the small SAM of the demo (rank 8, 96 px) and for ViT-B (rank 32, 224 px), method `flap`:
differences are drawn from a normal distribution, which no coding can make much smaller, unlike
those of training. `of full` is how many times fewer bytes than full fine-tuning in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from flap_nvflare.adapter.codec import decode, encode
from flap_nvflare.adapter.stages import parse
from flap_nvflare.sam.segmenter import blank_segmenter
from flap_nvflare.sam.tuning import trainable

WAYS: tuple[tuple[str, ...], ...] = (
    ("difference",),
    ("difference", "fp16", "deflate"),
    ("difference", "int8", "deflate"),
    ("difference", "int4", "deflate"),
    ("difference", "sign", "deflate"),
    ("difference", "top_k=0.1", "int4", "deflate"),
    ("difference", "top_k=0.05", "int4", "deflate"),
    ("difference", "top_k=0.15", "sign", "deflate"),
)
# Backbone, side of the image in pixels, rank.
SIZES = (("vit_t", 96, 8), ("vit_b", 224, 32))


@dataclass(frozen=True)
class Coded:
    """An update of one size through one list of stages.

    Attributes:
        arch: the backbone.
        stages: what is done.
        bytes: of the message, without FLARE's envelope of about 2 kB.
        bits: a number of the update.
        of_full: how many times fewer bytes than full fine-tuning in float32.
        error: relative L2 error of one message, without error feedback.
    """

    arch: str
    stages: str
    bytes: int
    bits: float
    of_full: float
    error: float


def measure(seed: int = 0) -> list[Coded]:
    """Every way for every size."""
    figures = []
    for arch, size, rank in SIZES:
        network = blank_segmenter(arch, size, 2, rank, lora=True)
        shapes = {name: tuple(p.shape) for name, p in trainable(network, "flap").items()}
        full = 4 * sum(p.numel() for p in trainable(network, "full").values())
        generator = torch.Generator().manual_seed(seed)
        update = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        whole = sum(float(tensor.square().sum()) for tensor in update.values())
        numbers = sum(tensor.numel() for tensor in update.values())
        for stages in WAYS:
            pipeline, reference = parse(stages), "0" * 64
            blob = encode(update, pipeline, reference)
            found = decode(blob, shapes, pipeline, reference)
            lost = sum(float((found[name] - update[name]).square().sum()) for name in update)
            figures.append(
                Coded(
                    arch=arch,
                    stages=", ".join(stages),
                    bytes=len(blob),
                    bits=8 * len(blob) / numbers,
                    of_full=full / len(blob),
                    error=(lost / whole) ** 0.5,
                )
            )
    return figures


def table(figures: Sequence[Coded]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| network | stages | bytes | bits a number | of full | relative error |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.arch} | {one.stages} | {one.bytes:,} | {one.bits:.2f} | {one.of_full:,.0f} "
        f"| {one.error:.3f} |"
        for one in figures
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or with --json the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.bench.wire", description="Bytes of a coded update."
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    figures = measure()
    if parser.parse_args(arguments).json:
        print(json.dumps([asdict(one) for one in figures], indent=2))
    else:
        print(table(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
