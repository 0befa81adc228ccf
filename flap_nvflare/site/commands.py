"""The commands `flap-nvflare site ...`: a hospital's policy over its startup kit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flap_nvflare.settings import SettingsError


def add_site(commands: argparse._SubParsersAction) -> None:
    """Adds the group `site`."""
    group = commands.add_parser("site", help="a hospital's own policy over its FLARE startup kit")
    parts = group.add_subparsers(dest="part", required=True, metavar="COMMAND")
    _add_init(parts)
    _add_show(parts)
    _add_audit(parts)


def _add_init(parts: argparse._SubParsersAction) -> None:
    command = parts.add_parser(
        "init", help="lay this package's policy over a startup kit; again at any time"
    )
    command.add_argument("kit", type=Path, help="the startup kit of a site or of the server")
    command.add_argument("--data-root", type=Path, metavar="FOLDER", help="the site's scans")
    command.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="SAM's official file, pinned by SHA-256"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1 or auto")
    command.add_argument(
        "--site", metavar="NAME", help="the site's name in its own table of cases, such as A"
    )
    command.add_argument(
        "--force", action="store_true", help="replace a privacy.json that was changed here"
    )
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_init)


def _init(parsed: argparse.Namespace) -> None:
    from dataclasses import asdict

    from flap_nvflare.site.kit import read_kit
    from flap_nvflare.site.overlay import lay

    found = lay(read_kit(parsed.kit), _values(parsed), parsed.force)
    if parsed.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    for one in found:
        print(f"{one.what:9} {one.path}" + (f" ({one.note})" if one.note else ""))
    print(f"Restart FLARE with this kit; what is in force: flap-nvflare site show {parsed.kit}")


def _values(parsed: argparse.Namespace) -> dict[str, str]:
    """The lines of the site's file that were given, each checked."""
    values: dict[str, str] = {}
    if parsed.data_root is not None:
        if not parsed.data_root.is_dir():
            raise SettingsError(f"--data-root {parsed.data_root}: no such folder")
        values["data_root"] = str(parsed.data_root.resolve())
    if parsed.checkpoint is not None:
        if not parsed.checkpoint.is_file():
            raise SettingsError(f"--checkpoint {parsed.checkpoint}: no such file")
        from flap_nvflare.sam.checkpoint import file_sha256

        values["checkpoint"] = str(parsed.checkpoint.resolve())
        values["checkpoint_sha256"] = file_sha256(parsed.checkpoint)
    for name in ("device", "site"):
        if getattr(parsed, name) is not None:
            values[name] = getattr(parsed, name)
    return values


def _add_show(parts: argparse._SubParsersAction) -> None:
    command = parts.add_parser(
        "show", help="what may leave this site, what a job may ask of it, and who decides"
    )
    command.add_argument("kit", type=Path, help="the startup kit of a site or of the server")
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_show)


def _show(parsed: argparse.Namespace) -> None:
    from flap_nvflare.site.kit import read_kit
    from flap_nvflare.site.show import lines, statement

    kit = read_kit(parsed.kit)
    if parsed.json:
        print(json.dumps(statement(kit), indent=2))
    else:
        print("\n".join(lines(kit)))


def _add_audit(parts: argparse._SubParsersAction) -> None:
    command = parts.add_parser("audit", help="sum up what left this site, and check the file")
    command.add_argument("kit", type=Path, help="the site's startup kit")
    command.add_argument("--job", default="", metavar="ID", help="this job alone")
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_audit)


def _audit(parsed: argparse.Namespace) -> int:
    from flap_nvflare.site.audit_summary import render, summary

    found = summary(parsed.kit, parsed.job)
    print(json.dumps(found.to_dict(), indent=2) if parsed.json else render(found))
    return 0 if found.intact else 1
