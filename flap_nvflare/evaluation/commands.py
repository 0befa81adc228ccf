"""The command `flap-nvflare evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID

TOLERANCE = 2.0


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Adds `evaluate`."""
    command = commands.add_parser(
        "evaluate", help="score a run's adapters at every site, beside sites alone and pooled scans"
    )
    command.description = (
        "Scores adapters on the cases of every site at native resolution: Dice, normalised surface "
        "Dice and HD95 by class, case and site, with means, worst site and bootstrap intervals. "
        "Writes evaluation.json, evaluation.csv, evaluation_summary.csv and pictures. Nothing "
        "leaves this machine."
    )
    command.add_argument(
        "path", type=Path, metavar="RUN_OR_ADAPTER", help="a run's folder, or an adapter's file"
    )
    command.add_argument(
        "--data-root", type=Path, required=True, metavar="ROOT", help="folder with the scans"
    )
    command.add_argument(
        "--sites", nargs="+", default=(), metavar="SITE", help="sites to score (default: the run's)"
    )
    command.add_argument("--split", choices=("test", "validation"), default="test")
    command.add_argument(
        "--checkpoint",
        default="",
        metavar="FILE",
        help="SAM's weights, if not in the package; default FLAP_SAM_CHECKPOINT",
    )
    command.add_argument(
        "--checkpoint-sha256", default="", metavar="HEX", help="the only base accepted"
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
    command.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="MM",
        help="of the surface Dice (default 2)",
    )
    command.add_argument("--local", action="store_true", help="train each site alone as well")
    command.add_argument("--pooled", action="store_true", help="train on all scans in one place")
    command.add_argument(
        "--leave-one-out",
        nargs="*",
        default=None,
        metavar="SITE",
        help="train the federation without each of these sites (without names: every one)",
    )
    command.add_argument(
        "--pictures", type=int, default=1, metavar="N", help="worst cases to draw of each site"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for the results (default: the run, or ADAPTER_evaluation beside the file)",
    )
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_evaluate)


def _evaluate(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from flap_nvflare.evaluation import tables
    from flap_nvflare.evaluation.evaluate import Asked, evaluate
    from flap_nvflare.evaluation.files import write_files

    path: Path = parsed.path
    asked = Asked(
        path=path,
        data_root=parsed.data_root,
        sites=tuple(parsed.sites),
        split=parsed.split,
        checkpoint=parsed.checkpoint,
        checkpoint_sha256=parsed.checkpoint_sha256,
        device=parsed.device,
        tolerance=parsed.tolerance,
        local=parsed.local,
        pooled=parsed.pooled,
        left_out=None if parsed.leave_one_out is None else tuple(parsed.leave_one_out),
        pictures=parsed.pictures,
    )
    beside = path if path.is_dir() else path.with_name(f"{path.stem}_evaluation")
    folder: Path = parsed.out or beside
    with Bars() as bars:
        found = evaluate(asked, folder, bars)
    write_files(folder, found)
    if parsed.json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    # As wide as the tables need: a pipe or a narrow terminal must not cut numbers.
    needed = 80 + 25 * len(found["class_names"])
    # Without markup: a name of a site or a class may hold brackets.
    tables.show(found, Console(width=max(needed, Console().width), markup=False))
    print(f"Results: {folder}")


class Bars:
    """Progress on stderr, one bar a task; see `evaluate.Listener`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._now: TaskID | None = None
        self._total = 0.0

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()
        self._progress.stop()

    def task(self, name: str, total: float) -> None:
        """Ends the bar before and begins one."""
        self._finish()
        self._now, self._total = self._progress.add_task(name, total=total), total

    def done(self, steps: float, what: str) -> None:
        """Moves the bar on."""
        if self._now is not None:
            self._progress.update(self._now, advance=steps, description=what)

    def reached(self, steps: float) -> None:
        """Moves the bar to a place."""
        if self._now is not None:
            self._progress.update(self._now, completed=steps)

    def _finish(self) -> None:
        """A baseline that was there already has taken no step."""
        if self._now is not None:
            self._progress.update(self._now, completed=self._total)
