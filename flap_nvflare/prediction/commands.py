"""The command `flap-nvflare predict`: scans in, masks out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flap_nvflare.bundle.trained import Trained
    from flap_nvflare.data.window import Window
    from flap_nvflare.prediction.cases import Done, Progress
    from flap_nvflare.prediction.inputs import Input


def add_predict(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand."""
    from flap_nvflare.bundle.commands import add_window_options

    command = commands.add_parser(
        "predict", help="masks of scans, from the adapter of a federated run"
    )
    command.description = (
        "Writes a mask on each scan's own grid, NAME_mask.nii.gz for NAME.nii.gz, readable by its "
        "owner only. Called again, it goes on from where it stopped. Exit code 0 only if every "
        "scan has its mask."
    )
    command.add_argument(
        "scans", type=Path, metavar="SCANS", help="NIfTI file, or folder of NIfTI files or DICOM"
    )
    command.add_argument(
        "--adapter", type=Path, required=True, metavar="FILE_OR_RUN", help="a run's best, or a file"
    )
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the masks")
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="SAM's weights, if not in the package; default FLAP_SAM_CHECKPOINT",
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
    command.add_argument(
        "--batch",
        type=int,
        default=0,
        metavar="SLICES",
        help="at once; as in training if not given",
    )
    add_window_options(command)
    command.add_argument("--series", default="", metavar="UID", help="one of several DICOM series")
    command.add_argument(
        "--overlays", action="store_true", help="three slices as PNG beside a mask"
    )
    command.add_argument("--overwrite", action="store_true", help="make masks anew that are there")
    command.add_argument("--json", action="store_true", help="a line of JSON by scan")
    command.set_defaults(run=_predict)


def _predict(parsed: argparse.Namespace) -> int:
    from flap_nvflare.bundle.grey import choose_window
    from flap_nvflare.bundle.trained import load_trained
    from flap_nvflare.prediction.cases import Cases, require_writable
    from flap_nvflare.prediction.inputs import find_inputs
    from flap_nvflare.prediction.predictor import Predictor
    from flap_nvflare.sam.checkpoint import file_sha256

    inputs = find_inputs(parsed.scans, parsed.series)
    require_writable(parsed.out)
    trained = load_trained(parsed.adapter, parsed.checkpoint or "")
    window, why = choose_window(trained.federation, parsed.window, parsed.site, parsed.data_root)
    _say(trained, window, why)
    cases = Cases(
        Predictor(trained, window, parsed.device, parsed.batch),
        (file_sha256(trained.file), trained.spec.base_sha256),
        parsed.out,
        parsed.overlays,
        parsed.overwrite,
    )
    failed: list[Done] = []
    with _bars(inputs) as progress:
        for done in cases.run(inputs, progress):
            if parsed.json or done.status != "failed":
                print(json.dumps(done.to_dict()) if parsed.json else _line(done), flush=True)
            failed += [done] if done.status == "failed" else []
    for done in failed:
        print(f"failed: {done.error}", file=sys.stderr)
    if len(inputs) > 1:
        print(f"{len(inputs) - len(failed)} of {len(inputs)} scans have masks", file=sys.stderr)
    return 1 if failed else 0


def _say(trained: Trained, window: Window | None, why: str) -> None:
    """Which adapter and grey values are used, on stderr beside the progress."""
    print(
        f"Adapter: {trained.file}, classes {', '.join(trained.federation.class_names)}",
        file=sys.stderr,
    )
    if window is None:
        print(f"Grey values: {why}", file=sys.stderr)
        return
    print(
        f"Grey values: {window.low:g} to {window.high:g} HU, mean {window.mean:g}, deviation "
        f"{window.std:g} ({why})",
        file=sys.stderr,
    )


def _line(done: Done) -> str:
    volumes = ", ".join(f"{name} {size['ml']:g} mL" for name, size in (done.classes or {}).items())
    shape = " x ".join(map(str, done.shape))
    kept = " (kept)" if done.status == "kept" else ""
    return f"{done.mask}{kept}: {shape}, {volumes}, {done.seconds:.1f} s"


@contextmanager
def _bars(inputs: list[Input]) -> Iterator[Progress]:
    """Bars over scans and over the slices of the present one, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    # Without markup: a file's name may hold brackets.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Bars(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        # Otherwise rich sends to stderr what is meant for a file or a program.
        redirect_stdout=sys.stdout.isatty(),
    ) as bars:
        scans = bars.add_task("scans", total=len(inputs))
        slices = bars.add_task("slices", total=None)
        order = {one.name: number for number, one in enumerate(inputs)}

        def tell(name: str, done: int, total: int) -> None:
            bars.update(scans, completed=order[name])
            bars.update(slices, description=f"slices of {name}", completed=done, total=total)

        yield tell
