"""Methods and baselines side by side: `python -m flap_nvflare.comparison RESULTS --data ROOT`.

Every cell is a row of `ROWS` with one seed, run by `experiment.run` and kept as one line of
JSON in the file RESULTS, so a comparison that was cut off goes on where it stopped. The table
gives the mean over the sites' test cases, then mean and deviation over the seeds. With `--curve`
a second table gives the Dice on validation cases after each round, with the seconds of training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flap_nvflare.comparison_rows import ROWS, TABLES
from flap_nvflare.data.layouts import site_names
from flap_nvflare.experiment import run
from flap_nvflare.settings import Federation


def compare(
    results: Path,
    data_root: Path,
    seeds: Sequence[int],
    rows: Sequence[str],
    settings: Mapping[str, Any],
    curve: bool = False,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Runs every cell that `results` does not hold yet; returns the cells asked for.

    Args:
        results: file of JSON lines, made or gone on with.
        data_root: folder in a layout that `data.layouts` knows.
        seeds: seeds of the federations.
        rows: names out of `ROWS`.
        settings: changes to the federation's defaults that hold for every row.
        curve: whether a cell holds the Dice of every round; one without it is run again.
        cache: folder for prepared scans, kept for the next comparison; None makes them anew for
            every cell.

    Raises:
        ValueError: on an unknown row, or if `results` holds a cell made with other settings.
    """
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise ValueError(f"row {unknown[0]!r} is not known; expected some of {tuple(ROWS)}")
    sites, data = site_names(data_root), str(data_root.resolve())
    known = {(cell["row"], cell["seed"]): cell for cell in _read(results)}
    cells = []
    for seed in seeds:
        for name in rows:
            federation = Federation.from_dict({**settings, **ROWS[name].settings, "seed": seed})
            cell = known.get((name, seed))
            made_with = cell and (cell["data"], Federation.whole(cell["federation"]))
            same = made_with == (data, federation.to_dict())
            if cell is None or (same and curve and "history" not in cell):
                row = ROWS[name]
                outcome = run(
                    row.mode,
                    federation,
                    data_root,
                    sites,
                    curve=curve,
                    attacks=row.attacks,
                    cache=cache,
                )
                cell = {"row": name, "data": data, **outcome.to_dict()}
                _append(results, cell)
                print(f"seed {seed}, {name}: {cell['mean']}", file=sys.stderr, flush=True)
            elif not same:
                raise ValueError(
                    f"{results}: {name!r} with seed {seed} was made with other settings or data; "
                    f"name another file"
                )
            cells.append(cell)
    return cells


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """The cells as a Markdown table: Dice in percent, mean and deviation over the seeds."""
    classes = list(cells[0]["mean"])
    lines = [
        "| " + " | ".join(["run", "parameters", *classes, "worst site", "seeds"]) + " |",
        "|---|" + "---:|" * (len(classes) + 3),
    ]
    for name in dict.fromkeys(cell["row"] for cell in cells):
        own = [cell for cell in cells if cell["row"] == name]
        figures = [_spread([cell["mean"][key] for cell in own]) for key in classes]
        worst = _spread([_worst(cell) for cell in own])
        size = f"{own[0]['parameters']:,}"
        lines.append("| " + " | ".join([name, size, *figures, worst, str(len(own))]) + " |")
    return "\n".join(lines)


def wire_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Dice in percent beside what the rounds cost.

    Bytes are those of a site's round, mean over sites and rounds, without FLARE's envelope; `of
    full` says how many times fewer they are than full fine-tuning's, both ways together.
    """
    lines = [
        "| run | mean | worst site | bytes up | bytes down | of full | error | server s | seeds |",
        "|---|" + "---:|" * 8,
    ]
    for name in dict.fromkeys(cell["row"] for cell in cells):
        own = [cell for cell in cells if cell["row"] == name]
        up, down = (statistics.fmean(cell["wire"][way] for cell in own) for way in ("up", "down"))
        error = statistics.fmean(cell["wire"]["error"] for cell in own)
        shown = [
            name,
            _spread([cell["mean"]["mean"] for cell in own]),
            _spread([_worst(cell) for cell in own]),
            f"{up:,.0f}",
            f"{down:,.0f}",
            f"{2 * own[0]['wire']['full'] / (up + down):,.1f}",
            f"{100 * error:.2f}%",
            f"{statistics.fmean(cell['wire']['seconds'] for cell in own):.3f}",
            str(len(own)),
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def curve_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Validation Dice in percent after each round and the seconds of training that it took.

    Mean and deviation over the seeds; seconds are of this machine, the sites one after another.
    """
    lines = ["| run | round | seconds | validation Dice | seeds |", "|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(cell["row"] for cell in cells):
        own = [cell["history"] for cell in cells if cell["row"] == name]
        for points in zip(*own, strict=True):
            seconds = statistics.fmean(point["seconds"] for point in points)
            dice = _spread([point["dice"]["mean"] for point in points])
            shown = [name, str(points[0]["round"] + 1), f"{seconds:.1f}", dice, str(len(points))]
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _worst(cell: Mapping[str, Any]) -> float | None:
    """The lowest mean Dice of a site; sites without one are left out."""
    known = [site["mean"] for site in cell["sites"].values() if site["mean"] is not None]
    return min(known, default=None)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    mean = f"{100 * statistics.fmean(known):.1f}"
    return mean if len(known) < 2 else f"{mean} ± {100 * statistics.stdev(known):.1f}"


def _append(results: Path, cell: Mapping[str, Any]) -> None:
    """A line of its own, whatever a kill has left at the end of the file."""
    known = results.read_bytes() if results.is_file() else b""
    start = "\n" if known and not known.endswith(b"\n") else ""
    with results.open("a", encoding="utf-8") as file:
        file.write(start + json.dumps(cell) + "\n")


def _read(results: Path) -> list[dict[str, Any]]:
    """The whole lines; one that was cut off by a kill is left out, so its cell is run again."""
    if not results.is_file():
        return []
    cells = []
    for line in results.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            cells.append(json.loads(line))
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m flap_nvflare.comparison`."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.comparison",
        description="Compare methods and baselines on one data set, over several seeds.",
    )
    parser.add_argument("results", type=Path, help="file of JSON lines, made or gone on with")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder in a layout that `data.layouts` knows"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", choices=ROWS)
    parser.add_argument(
        "--table", choices=TABLES, default="methods", help="all rows of a table, unless --rows"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings for every row"
    )
    parser.add_argument(
        "--curve", action="store_true", help="score every round on the validation cases as well"
    )
    parser.add_argument("--cache", type=Path, help="folder for prepared scans, to be used again")
    parsed = parser.parse_args(arguments)
    try:
        settings = {
            name: yaml.safe_load(value)
            for name, _, value in (text.partition("=") for text in parsed.set)
        }
        cells = compare(
            parsed.results,
            parsed.data,
            parsed.seeds,
            parsed.rows or list(TABLES[parsed.table]),
            settings,
            parsed.curve,
            parsed.cache,
        )
        print(table(cells))
        if federated := [cell for cell in cells if "wire" in cell]:
            print("\n" + wire_table(federated))
        if parsed.curve:
            print("\n" + curve_table(cells))
    except (ValueError, OSError) as error:
        print(f"comparison: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
