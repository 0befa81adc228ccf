"""The command `flap-nvflare prepare`: is a download whole, and what is in it?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from flap_nvflare.data.entries import Entry
    from flap_nvflare.data.preparation import Preparation, SiteFacts

LAYOUTS = ("kits", "ixi", "prostate", "nnunet")
_MOST_LINES = 20  # of problems; --json names all


def add_prepare(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand."""
    command = commands.add_parser(
        "prepare", help="check a downloaded data set, and write which case is of which site"
    )
    command.description = (
        "Checks that every case has scan and mask on one grid, reads the voxels of one case a "
        "site, and names everything that is missing. Where all is well it writes sites.csv (case, "
        "site, split) into ROOT, which training then follows and you may edit; KiTS has a table "
        "of its own. Trains nothing and sends nothing. Exit code 0 only if a federation can start."
    )
    command.add_argument("layout", choices=LAYOUTS, help="the Decathlon's is nnunet")
    command.add_argument("root", type=Path, metavar="ROOT", help="folder with the scans")
    command.add_argument(
        "--site", default="", metavar="NAME", help="all cases are of this site; nnunet needs it"
    )
    command.add_argument("--deep", action="store_true", help="read the voxels of every case")
    command.add_argument("--force", action="store_true", help="write a sites.csv anew")
    command.add_argument(
        "--copy-geometry",
        action="store_true",
        help="write the scan's header into a mask of its shape whose own differs; the mask as it "
        "was stays beside it as NAME.orig. Look at the picture afterwards",
    )
    command.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="PNG of three slices a site, readable by you alone; default LAYOUT_sites.png here",
    )
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_prepare)


def _prepare(parsed: argparse.Namespace) -> int:
    from flap_nvflare.data.preparation import Asked, prepare

    asked = Asked(
        parsed.layout, parsed.root, parsed.site, parsed.deep, parsed.force, parsed.copy_geometry
    )
    found = prepare(asked, _progress)
    picture = _picture(found, parsed.picture or Path(f"{parsed.layout}_sites.png"))
    if parsed.json:
        print(json.dumps(_as_json(found, picture), indent=2))
    else:
        _show(found, picture)
    return 0 if found.ok else 1


def _picture(found: Preparation, path: Path) -> Path | None:
    """One row a site; None if no voxels could be read."""
    from flap_nvflare.data.panels import draw_rows

    rows = [facts.picture for _, facts in sorted(found.sites.items()) if facts.picture]
    return draw_rows(path, rows, found.class_names) if rows else None


def _as_json(found: Preparation, picture: Path | None) -> dict[str, Any]:
    return {
        "ok": found.ok,
        "layout": found.layout.name,
        "synthetic": found.synthetic,
        "class_names": list(found.class_names),
        "grey_values": found.grey_values,
        "sites": {site: _site(facts, found) for site, facts in sorted(found.sites.items())},
        "problems": found.problems,
        "notes": found.notes,
        "mended": found.mended,
        "picture": str(picture) if picture else None,
    }


def _site(facts: SiteFacts, found: Preparation) -> dict[str, Any]:
    names = enumerate(found.class_names, start=1)
    return {
        "train": facts.train,
        "test": facts.test,
        "shapes": facts.shapes,
        "spacings_mm": facts.spacings,
        "cases_read": facts.read,
        "cases_with_class": {name: facts.shown.get(number, 0) for number, name in names},
        "foreground_percentiles": facts.grey,
    }


def _show(found: Preparation, picture: Path | None) -> None:
    from rich.console import Console

    if found.synthetic:
        print("Synthetic scans: nobody's, and no figure on them says anything about patients.")
    if found.sites:
        # As wide as it needs: a pipe or a narrow terminal must not cut numbers.
        Console(width=200).print(_table(found))
    for problem in found.problems[:_MOST_LINES]:
        print(f"problem: {problem}")
    if len(found.problems) > _MOST_LINES:
        print(f"problem: and {len(found.problems) - _MOST_LINES} more; --json names all")
    if found.problems:
        print(f"the data set: {found.layout.origin}")
    for mask in found.mended:
        print(f"mended: {mask} has its scan's geometry; as it was: {mask}.orig")
    for note in found.notes:
        print(f"note: {note}")
    if picture is not None:
        print(f"picture: {picture}; do the outlines lie on the organ?")
    print("for the job's federation.yaml:")
    print(f"class_names: {json.dumps(list(found.class_names), ensure_ascii=False)}")
    print(f"grey_values: {found.grey_values}")


def _table(found: Preparation) -> Table:
    from rich.table import Table

    table = Table(title=f"{found.layout.name}: cases by site", title_justify="left")
    for name in ("site", "train", "test", "slices", "pixels", "mm between", "mm across"):
        table.add_column(name, justify="left" if name == "site" else "right")
    table.add_column("read")
    table.add_column("foreground 0.5 / 50 / 99.5 %", justify="right")
    for site, facts in sorted(found.sites.items()):
        shown = (
            f"{name} in {facts.shown.get(number, 0)}"
            for number, name in enumerate(found.class_names, start=1)
        )
        table.add_row(
            site,
            str(len(facts.train)),
            str(len(facts.test)),
            _range(shape[0] for shape in facts.shapes),
            _range(side for shape in facts.shapes for side in shape[1:]),
            _range(spacing[0] for spacing in facts.spacings),
            _range(step for spacing in facts.spacings for step in spacing[1:]),
            f"{facts.read}: {', '.join(shown)}",
            " / ".join(map(_grey, facts.grey)) if facts.grey else "-",
        )
    return table


def _grey(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    if not found:
        return "-"
    low, high = f"{found[0]:.3g}", f"{found[-1]:.3g}"
    return low if low == high else f"{low} to {high}"


def _progress(entries: Sequence[Entry]) -> Iterable[Entry]:
    """The cases, with a bar on the error stream where somebody sees it."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        entries, description="Reading cases", console=console, disable=not console.is_terminal
    )
