"""Speed and memory of this package as ratios: `python -m flap_nvflare.bench`.

Every ratio is of two ways run in turn in this process, each by its fastest run; memory peaks come
from a process of their own each. On a GPU if torch sees one, else on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence

import torch

from flap_nvflare.bench.rows import GROUPS, Setting
from flap_nvflare.bench.timing import Row
from flap_nvflare.sam.runtime import computes_bf16


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(prog="python -m flap_nvflare.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows"
    )
    parser.add_argument("--repeats", type=int, default=4, help="runs of every way (default 4)")
    parser.add_argument("--batch", type=int, default=1, help="images in a step (default 1)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512], help="pixels")
    parser.add_argument("--device", help="cpu or cuda; what torch finds if not given")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    setting = Setting(
        device, computes_bf16(device), options.repeats, options.batch, tuple(options.sizes)
    )
    rows: list[Row] = []
    for group in options.only:
        print(f"measuring: {group}", file=sys.stderr, flush=True)
        rows += _measured(group, GROUPS[group], setting)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print(_text(rows, setting))
    return 0


def _measured(group: str, measure: Callable[[Setting], list[Row]], setting: Setting) -> list[Row]:
    try:
        return measure(setting)
    except ImportError as error:
        print(f"left out: {group}: {error}; pip install '.[bench]'", file=sys.stderr)
        return []


def _text(rows: Sequence[Row], setting: Setting) -> str:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{setting.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"batch {setting.batch}; ratio: times faster for s, ours as a share for all else"
    )
    table = Table(title=title, title_justify="left")
    for name in ("name", "ours", "reference", "ratio", "unit", "what"):
        table.add_column(
            name, justify="right" if name in ("ours", "reference", "ratio") else "left"
        )
    for row in rows:
        figures = [
            "-" if value is None else f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
            for value in (row.ours, row.reference, row.ratio)
        ]
        table.add_row(row.name, *figures, row.unit, row.note)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


if __name__ == "__main__":
    raise SystemExit(main())
