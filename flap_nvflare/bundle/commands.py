"""The group `flap-nvflare export`: a trained adapter in the layout of other programs."""

from __future__ import annotations

import argparse

from flap_nvflare.bundle.peft_commands import add_peft

LAYOUTS = (add_peft,)


def add_export(commands: argparse._SubParsersAction) -> None:
    """Adds the group `export`, one subcommand a layout."""
    group = commands.add_parser("export", help="a trained adapter for other programs")
    parts = group.add_subparsers(dest="part", required=True, metavar="LAYOUT")
    for add in LAYOUTS:
        add(parts)
