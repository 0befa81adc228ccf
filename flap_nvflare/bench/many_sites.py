"""What the rules cost by the number of sites, at ViT-B's size: `python -m
flap_nvflare.bench.many_sites --sites 6 20 100 --rules svd mean`, a Markdown table.

Every figure comes from a fresh process in which the updates are made one at a time, folded
in, and dropped, as at a server. On Linux, whose /proc tells the peak of memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch

from flap_nvflare.adapter.factors import LORA_A, LORA_B, pairs
from flap_nvflare.aggregation import RULES, Card, Contribution, accumulator, card
from flap_nvflare.bench.timing import process_bytes

Shapes = Mapping[str, tuple[int, ...]]


def _adapters(
    stem: str, count: int, rows: int, columns: int, rank: int
) -> dict[str, tuple[int, ...]]:
    return {
        f"{stem}.{index:02d}{suffix}": shape
        for index in range(count)
        for suffix, shape in ((LORA_A, (rank, columns)), (LORA_B, (rows, rank)))
    }


VIT_B: Shapes = MappingProxyType(
    {
        **_adapters("encoder", 24, 768, 768, 32),
        **_adapters("decoder.cross", 10, 128, 256, 32),
        **_adapters("decoder.self", 4, 256, 256, 32),
        "head": (478_320,),
    }
)
"""What method `flap` sends for SAM ViT-B at rank 32: 1,846,384 numbers."""


@dataclass(frozen=True)
class SiteFigures:
    """What one rule costs the server for one number of sites.

    Attributes:
        rule: the rule.
        sites: updates folded in.
        threads: threads of torch.
        fold_seconds: median time to fold one update in.
        slowest_fold_seconds: the longest; where stacked factors become dense products, all
            that were stacked are folded again.
        result_seconds: from the last update's arrival to the aggregate, its own fold included.
        peak_bytes: peak of the process's memory above its start, one update included.
        error: relative error of the aggregate.
    """

    rule: str
    sites: int
    threads: int
    fold_seconds: float
    slowest_fold_seconds: float
    result_seconds: float
    peak_bytes: int
    error: float


def travelling(card: Card, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """What of an update a rule's sites send, in the first round.

    Args:
        card: what the rule is.
        shapes: all that may train, with both factors of every adapter.
    """
    found = dict(shapes)
    for pair in pairs(shapes):
        if card.trains == "core":
            rank = shapes[pair.a][0]
            found[f"{pair.stem}.lora_core"] = (rank, rank)
        if card.trains != "ab":  # of `alternate` B comes first
            del found[pair.a]
        if card.trains == "core" or card.private == "b":
            del found[pair.b]
    return found


def updates(
    shapes: Shapes, sites: int, drift: float = 0.3, seed: int = 0
) -> Iterator[Contribution]:
    """Updates that drifted from a common start, as after a round of training; one at a time.

    Args:
        shapes: shape of every tensor by name.
        sites: updates; site k has the weight k + 1.
        drift: size of a site's own part relative to the common start.
        seed: seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for site in range(sites):
        tensors = {
            name: tensor + drift * torch.randn(tensor.shape, generator=generator)
            for name, tensor in start.items()
        }
        yield Contribution(f"site-{site}", float(site + 1), tensors)


def measure_many(
    sites: Sequence[int] = (10, 50, 100),
    rules: Sequence[str] = tuple(RULES),
    shapes: Shapes = VIT_B,
) -> list[SiteFigures]:
    """Measures every rule with every number of sites, each in a fresh process.

    The processes import the caller's main module: a script needs its `__main__` guard.
    """
    spawn = multiprocessing.get_context("spawn")
    figures = []
    for rule in rules:
        for count in sites:
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                figures.append(process.submit(measure_sites, rule, count, dict(shapes)).result())
    return figures


TABLE_HEAD = (
    "| rule | sites | result s | fold s, median | slowest fold s | peak MiB |\n"
    "|---|---:|---:|---:|---:|---:|"
)


def table_line(one: SiteFigures) -> str:
    """The figures as a line of a Markdown table under `TABLE_HEAD`."""
    seconds = (one.result_seconds, one.fold_seconds, one.slowest_fold_seconds)
    shown = " | ".join(f"{value:.3f}" for value in seconds)
    return f"| {one.rule} | {one.sites} | {shown} | {one.peak_bytes / 2**20:,.0f} |"


def measure_sites(rule: str, sites: int, shapes: Shapes = VIT_B) -> SiteFigures:
    """Measures one rule with one number of sites in this process.

    Args:
        rule: the rule.
        sites: updates folded in; a robust rule needs enough to outvote one.
        shapes: all that may train; see `travelling`.
    """
    _warm_up(rule)
    before = process_bytes("VmRSS")
    collected, seconds = accumulator(rule), []
    for one in updates(travelling(card(rule), shapes), sites):
        started = time.perf_counter()
        collected.add(one)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    result = collected.result()
    finished = time.perf_counter() - started
    return SiteFigures(
        rule=rule,
        sites=sites,
        threads=torch.get_num_threads(),
        fold_seconds=statistics.median(seconds),
        slowest_fold_seconds=max(seconds),
        result_seconds=seconds[-1] + finished,
        peak_bytes=process_bytes("VmHWM") - before,
        error=result.error,
    )


def _warm_up(rule: str) -> None:
    """Both forms of the products once, small: the first call loads the linear algebra."""
    shapes = travelling(card(rule), _adapters("warm", 1, 64, 64, 4))
    for count in (5, 9):
        collected = accumulator(rule)
        for one in updates(shapes, count):
            collected.add(one)
        collected.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m flap_nvflare.bench.many_sites`."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.bench.many_sites",
        description="Measure what rules cost the server, at the size of SAM ViT-B.",
    )
    parser.add_argument("--sites", type=int, nargs="+", default=[6, 20, 100], help="updates")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, metavar="RULE")
    parsed = parser.parse_args(arguments)
    print(
        f"result: from the last update's arrival to the aggregate. torch {torch.__version__}, "
        f"{os.cpu_count()} cores\n\n{TABLE_HEAD}",
        flush=True,
    )
    for rule in parsed.rules:
        for sites in parsed.sites:  # a line as soon as it is known: all of them take long
            for one in measure_many((sites,), (rule,)):
                print(table_line(one), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
