"""The commands `flap-nvflare export ...`: a trained adapter in the formats of others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from flap_nvflare.bundle.peft_commands import add_peft


def add_export(commands: argparse._SubParsersAction) -> None:
    """Adds the group `export`."""
    group = commands.add_parser("export", help="write a trained adapter in another format")
    parts = group.add_subparsers(dest="part", required=True, metavar="FORMAT")
    for add in _FORMATS:
        add(parts)


def add_window_options(command: argparse.ArgumentParser) -> None:
    """Adds what `grey.choose_window` reads: `--window`, `--site`, `--data-root`."""
    grey = command.add_argument_group(
        "grey values",
        "without any, for kidney and tumour the mean over the sites of Fed-KiTS2019; of an adapter "
        "trained with grey_values: scan each scan's own, and none of these options is taken",
    )
    grey.add_argument(
        "--window", type=float, nargs=4, metavar=("LOW", "HIGH", "MEAN", "STD"), help="in HU"
    )
    grey.add_argument("--site", default="", help="a site of Fed-KiTS2019, or of --data-root")
    grey.add_argument(
        "--data-root", type=Path, metavar="FOLDER", help="read them off a site's training cases"
    )


def _add_bundle(parts: argparse._SubParsersAction) -> None:
    command = parts.add_parser(
        "bundle", help="a MONAI Bundle as in the model zoo, with merged weights"
    )
    command.add_argument("out", type=Path, help="folder to write, which must not exist yet")
    command.add_argument(
        "--adapter", type=Path, required=True, metavar="FILE_OR_RUN",
        help="an adapter's file, or the folder of a run, whose best adapter is taken",
    )  # fmt: skip
    command.add_argument(
        "--checkpoint",
        default="",
        metavar="SAM.pth",
        help="SAM's weights, unless it is ViT-T; default FLAP_SAM_CHECKPOINT",
    )
    add_window_options(command)
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_bundle)


def _bundle(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from flap_nvflare.bundle.export import write_bundle
    from flap_nvflare.bundle.grey import choose_window
    from flap_nvflare.bundle.trained import load_trained

    with Console(stderr=True).status("Merging the adapter into its base"):
        trained = load_trained(parsed.adapter, parsed.checkpoint)
        window, note = choose_window(
            trained.federation, parsed.window, parsed.site, parsed.data_root
        )
        write_bundle(parsed.out, trained, window, note)
    files = sorted(path for path in parsed.out.rglob("*") if path.is_file())
    if parsed.json:
        sizes = {path.relative_to(parsed.out).as_posix(): path.stat().st_size for path in files}
        print(json.dumps({"bundle": str(parsed.out), "window": note, "bytes": sizes}, indent=2))
        return
    print(f"MONAI Bundle in {parsed.out}; its commands: {parsed.out / 'docs' / 'README.md'}")
    if window is None:
        print(f"Grey window: {note}")
        return
    print(f"Grey window: {window.low:g} {window.high:g} {window.mean:g} {window.std:g} HU, {note}")


# One line a format.
_FORMATS: tuple[Callable[[argparse._SubParsersAction], None], ...] = (_add_bundle, add_peft)
