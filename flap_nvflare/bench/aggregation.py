"""Times the cut by QR against the dense SVD: `python -m flap_nvflare.bench.aggregation`.

The dense way forms every weighted mean product and decomposes it. Both ways run in turn in
this process, on the same float32 factors, in float64; each is timed by its fastest run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import LORA_A, LORA_B, pairs
from flap_nvflare.aggregation.mean import Mean
from flap_nvflare.aggregation.rule import Aggregate, Contribution, fold
from flap_nvflare.aggregation.svd import Svd
from flap_nvflare.bench.many_sites import updates

Result = TypeVar("Result")


@dataclass(frozen=True)
class Figures:
    """What the benchmark measures.

    Attributes:
        layers: adapters.
        side: rows and columns of each product.
        sites: contributions.
        rank: rank of each adapter.
        threads: threads of torch.
        qr_seconds: fastest run of the rule `svd`.
        dense_seconds: fastest run of the dense way.
        ratio: dense_seconds / qr_seconds.
        difference: relative Frobenius distance of the two ways' products.
        svd_error: relative error of `svd` against the exact mean products.
        mean_error: the same of `mean`.
    """

    layers: int
    side: int
    sites: int
    rank: int
    threads: int
    qr_seconds: float
    dense_seconds: float
    ratio: float
    difference: float
    svd_error: float
    mean_error: float


def drifted(
    layers: int, side: int, sites: int, rank: int, drift: float = 0.3, seed: int = 0
) -> list[Contribution]:
    """Updates whose factors drifted from a common start, as after a round of training.

    Args:
        layers: adapters of each update.
        side: rows and columns of each product.
        sites: updates; site k has the weight k + 1.
        rank: rank of each adapter.
        drift: size of a site's own part relative to the common start.
        seed: seed of the factors.
    """
    shapes = {
        f"layer.{layer:02d}{suffix}": shape
        for layer in range(layers)
        for suffix, shape in ((LORA_A, (rank, side)), (LORA_B, (side, rank)))
    }
    return list(updates(shapes, sites, drift, seed))


def dense_products(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """The best cut of each mean product by the SVD of the whole matrix, float64, by stem."""
    total = sum(one.weight for one in contributions)
    products = {}
    for pair in pairs(contributions[0].tensors):
        rank = contributions[0].tensors[pair.a].shape[0]
        exact = torch.stack(
            [
                one.weight / total * (one.tensors[pair.b].double() @ one.tensors[pair.a].double())
                for one in contributions
            ]
        ).sum(dim=0)
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        products[pair.stem] = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return products


def measure(
    layers: int = 24, side: int = 768, sites: int = 6, rank: int = 32, repeats: int = 3
) -> Figures:
    """Runs both ways in turn `repeats` times."""
    contributions = drifted(layers, side, sites, rank)
    _cut(drifted(1, side, sites, rank))  # a first call pays for loading the linear algebra
    qr_seconds, dense_seconds = [], []
    for _ in range(repeats):
        cut, seconds = _timed(_cut, contributions)
        qr_seconds.append(seconds)
        dense, seconds = _timed(dense_products, contributions)
        dense_seconds.append(seconds)
    return Figures(
        layers=layers,
        side=side,
        sites=sites,
        rank=rank,
        threads=torch.get_num_threads(),
        qr_seconds=min(qr_seconds),
        dense_seconds=min(dense_seconds),
        ratio=min(dense_seconds) / min(qr_seconds),
        difference=_difference(cut, dense),
        svd_error=cut.error,
        mean_error=fold(Mean(), contributions).error,
    )


def _cut(contributions: Sequence[Contribution]) -> Aggregate:
    return fold(Svd(), contributions)


def _timed(
    work: Callable[[Sequence[Contribution]], Result], contributions: Sequence[Contribution]
) -> tuple[Result, float]:
    started = time.perf_counter()
    result = work(contributions)
    return result, time.perf_counter() - started


def _difference(cut: Aggregate, dense: dict[str, Tensor]) -> float:
    lost = whole = 0.0
    for stem, product in dense.items():
        ours = cut.tensors[stem + LORA_B].double() @ cut.tensors[stem + LORA_A].double()
        lost += float((ours - product).square().sum())
        whole += float(product.square().sum())
    return (lost / whole) ** 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures as text, or with --json as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.bench.aggregation",
        description="Time the cut by QR against the SVD of the dense mean products.",
    )
    for name, value in (("layers", 24), ("side", 768), ("sites", 6), ("rank", 32), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    figures = measure(**options)
    if as_json:
        print(json.dumps(asdict(figures), sort_keys=True))
    else:
        print(_text(figures))
    return 0


def _text(figures: Figures) -> str:
    return "\n".join(
        (
            f"{figures.layers} adapters of {figures.side} x {figures.side}, rank {figures.rank}, "
            f"{figures.sites} sites, {figures.threads} threads, float64",
            f"QR and small SVD   {figures.qr_seconds:8.3f} s",
            f"dense SVD          {figures.dense_seconds:8.3f} s",
            f"ratio              {figures.ratio:8.1f}",
            f"difference         {figures.difference:8.1e} (relative, of the products)",
            f"error of svd       {figures.svd_error:8.2%} of the exact mean products",
            f"error of mean      {figures.mean_error:8.2%}",
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
