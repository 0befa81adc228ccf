"""The subcommand `phantom`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flap_nvflare.data.phantoms import KINDS, MODALITIES, Phantoms


def add_phantom(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "phantom", help="write synthetic scans in the layout of a public data set"
    )
    command.description = (
        "Draws synthetic scans of several hospitals, nobody's data, in the layout of a public data "
        "set. Same knobs, same bytes; a folder that holds anything else is refused."
    )
    command.add_argument("out", type=Path, help="folder to write into")
    command.add_argument("--kind", choices=KINDS, default="kits", help="what is drawn")
    command.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    command.add_argument(
        "--difference",
        type=float,
        default=1.0,
        help="how far the scanners are from each other: 0 all alike, 3 very different",
    )
    command.add_argument(
        "--sites",
        default="",
        metavar="ABC|N",
        help="sites to write, such as ABC or Guys,HH; or of kind kits a number: so many sites "
        "S001, S002, and so on",
    )
    command.add_argument("--train", type=int, default=0, metavar="N", help="training cases a site")
    command.add_argument("--test", type=int, default=0, metavar="N", help="test cases a site")
    command.add_argument(
        "--labels",
        type=float,
        default=0.0,
        metavar="MM",
        help="outlines too wide at one site, too tight at the next, true at the third",
    )
    command.add_argument("--modality", choices=MODALITIES, default="ct", help="of kind kits")
    command.set_defaults(run=_phantom)


def _phantom(parsed: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from flap_nvflare.data.phantoms import phantom_sites, write_phantoms

    number = int(parsed.sites) if parsed.sites.isdecimal() else 0
    phantoms = Phantoms(
        kind=parsed.kind,
        seed=parsed.seed,
        sites=number,
        train=parsed.train,
        test=parsed.test,
        difference=parsed.difference,
        labels=parsed.labels,
        modality=parsed.modality,
    )
    letters = parsed.kind == "kits" and "," not in parsed.sites
    named = list(parsed.sites if letters else parsed.sites.split(","))
    only = None if number or not parsed.sites else named
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Synthetic scans", total=None)
        write_phantoms(
            parsed.out,
            phantoms,
            only,
            lambda done, of: bar.update(task, completed=done, total=of),
        )
    sites = phantom_sites(phantoms) if only is None else dict.fromkeys(only)
    print(f"Synthetic scans of sites {', '.join(sites)} in {parsed.out}")
