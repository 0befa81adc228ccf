"""The command `flap-nvflare`: each subcommand reads its arguments, calls a room, prints.

Rooms are imported inside the subcommands, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from flap_nvflare import __version__
from flap_nvflare.settings import ARCHITECTURES


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand; the exit code is 0 only on success."""
    from flap_nvflare.bundle.commands import add_export
    from flap_nvflare.bundle.peft_commands import add_import
    from flap_nvflare.data.commands import add_phantom
    from flap_nvflare.data.prepare_commands import add_prepare
    from flap_nvflare.evaluation.commands import add_evaluate
    from flap_nvflare.experiments.commands import add_experiment
    from flap_nvflare.prediction.commands import add_predict
    from flap_nvflare.report.commands import add_report
    from flap_nvflare.site.commands import add_site

    parser = argparse.ArgumentParser(prog="flap-nvflare", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_count(commands)
    _add_doctor(commands)
    add_evaluate(commands)
    add_experiment(commands)
    add_export(commands)
    add_import(commands)
    add_phantom(commands)
    add_predict(commands)
    add_prepare(commands)
    add_report(commands)
    _add_rules(commands)
    add_site(commands)
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed) or 0)
    except (ValueError, OSError) as error:
        print(f"flap-nvflare {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"flap-nvflare {parsed.command}: stopped from the keyboard", file=sys.stderr)
        return 130  # as a shell counts it


def _add_count(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "count", help="parameters, bytes and reduction of the seven methods"
    )
    command.add_argument("--arch", choices=ARCHITECTURES, default="vit_b")
    command.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    command.add_argument("--classes", type=int, default=2, help="foreground classes")
    command.add_argument("--rank", type=int, default=32)
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_count)


def _count(parsed: argparse.Namespace) -> None:
    from flap_nvflare.sam.tuning import count

    rows = count(parsed.arch, parsed.image_size, parsed.classes, parsed.rank)
    if parsed.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{parsed.arch} at {parsed.image_size} px, {parsed.classes} classes, "
        f"rank {parsed.rank}: one transfer in fp32",
        title_justify="left",
    )
    for name in ("method", "parameters", "bytes", "reduction"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(row.method, f"{row.parameters:,}", f"{row.bytes:,}", f"{row.reduction:.1f}")
    Console().print(table)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "doctor", help="check a site's machine, kit, data and connection before the first job"
    )
    command.description = (
        "Checks a site's machine before its first job and says for each failure what to do. "
        "Nothing is sent but one TLS handshake to the federation's server. Exit code 0 only if "
        "nothing failed."
    )
    command.add_argument(
        "kit", type=Path, nargs="?", metavar="KIT", help="startup kit; without it the machine alone"
    )
    command.add_argument("--data-root", default="", help="folder with the scans, for the file's")
    command.add_argument("--checkpoint", default="", help="file of SAM's weights, for the file's")
    command.add_argument("--site", default="", help="name of the site in its table of cases")
    command.add_argument(
        "--federation", type=Path, help="federation.yaml of the job to come: classes, sizes"
    )
    command.add_argument(
        "--picture", type=Path, metavar="FILE", help="PNG of three slices; default KIT/flap"
    )
    command.add_argument("--timeout", type=float, default=5.0, help="seconds for the server")
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    from flap_nvflare.site.doctor_command import run

    return run(parsed)


def _add_rules(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "rules", help="the rules of aggregation: what travels, what is exact, what they exclude"
    )
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_rules)


def _rules(parsed: argparse.Namespace) -> None:
    from flap_nvflare.rules_table import rows

    found = rows()
    if parsed.json:
        print(json.dumps([row.to_dict() for row in found], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Bytes: vit_b, method flap, rank 32, fp32, one site and round",
        title_justify="left",
    )
    for name in ("rule", "up", "bytes", "down", "bytes", "exact", "streaming", "robust", "linear"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    table.add_column("unequal ranks")
    for row in found:
        most = f" to {row.bytes_down_most:,}" if row.bytes_down_most > row.bytes_down else ""
        flags = (row.streaming, row.robust, row.linear, row.unequal_ranks)
        table.add_row(
            row.name,
            row.up,
            f"{row.bytes_up:,}",
            row.down,
            f"{row.bytes_down:,}{most}",
            row.exact,
            *("yes" if flag else "no" for flag in flags),
        )
    # A table as wide as it needs: a pipe or a narrow terminal must not cut numbers.
    console = Console(width=200)
    console.print(table)
    for row in found:
        print(f"\n{row.name}: {row.formula} ({row.paper})")
        for setting, reason in row.excludes.items():
            print(f"  not with {setting}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
