"""One cell: what it needs checked, its training run, its figures in a folder of its own."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flap_nvflare.data.phantoms import Phantoms, write_phantoms
from flap_nvflare.experiments.grid import Cell, data_values
from flap_nvflare.experiments.groups import SIMULATOR
from flap_nvflare.settings import Federation, SettingsError

CELL = "cell.json"
FAILED = "failed.txt"  # how its last training ended, if not well
_VERSIONS = ("flap_nvflare", "torch", "monai", "nvflare")


@dataclass(frozen=True)
class Desk:
    """Where a grid's cells lie.

    Attributes:
        out: folder of the grid; each cell has a folder in it.
        scans: folder of the phantoms and of what is prepared from scans, which grids share.
        threads: sites that FLARE's simulator keeps at work at a time.
    """

    out: Path
    scans: Path
    threads: int = 2

    def folder(self, cell: Cell) -> Path:
        """The cell's own folder."""
        return self.out / "cells" / cell.folder

    def root(self, data: Phantoms | Path) -> Path:
        """The folder of scans; phantoms have one for each set of knobs."""
        if isinstance(data, Path):
            return data
        changed = [
            f"{name}={value}"
            for name, value in data_values(data).items()
            if value != getattr(Phantoms(), name) and name != "kind"
        ]
        return self.scans / "_".join([data.kind, *changed])


def kept(cell: Cell, desk: Desk) -> dict[str, Any] | None:
    """The figures of the cell if it was run before; None if not, or if they are cut off.

    Raises:
        SettingsError: if the folder holds figures that were made with other settings.
    """
    path = desk.folder(cell) / CELL
    if not path.is_file():
        return None
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text
        return None
    try:
        different = same(figures, cell)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{path}: holds no cell ({error!r}); remove its folder") from error
    if different:
        raise SettingsError(
            f"{path}: was made with another {different}; name another folder by --out, or remove "
            "this one"
        )
    return None if cell.curve and "history" not in figures else figures


def same(figures: Mapping[str, Any], cell: Cell) -> str | None:
    """What the figures were made with otherwise than the cell asks; None if they are the cell's."""
    found, wanted = _comparable(figures), json.loads(json.dumps(cell.made_with()))
    for name, value in wanted.items():
        if found.get(name) != value:
            return _difference(name, found.get(name), value)
    return None


def _comparable(figures: Mapping[str, Any]) -> dict[str, Any]:
    """As `Cell.made_with` says it now: settings that came later have their default."""
    return {
        **figures,
        "federation": Federation.from_dict(figures["federation"]).to_dict(),
        "data": _whole(figures["data"]),
        "test_on": {name: _whole(values) for name, values in figures["test_on"].items()},
    }


def _difference(name: str, found: Any, wanted: Any) -> str:
    """The first difference between two values, as deep as they have names."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in (*wanted, *found):
            if found.get(key) != wanted.get(key):
                return _difference(f"{name}: {key}", found.get(key), wanted.get(key))
    return f"{name}, {found!r} and not {wanted!r}"


def _whole(data: Mapping[str, Any]) -> dict[str, Any]:
    return dict(data) if "root" in data else data_values(Phantoms(**data))


def prepare(data: Phantoms | Path, desk: Desk) -> list[str]:
    """The sites of a folder of scans, its phantoms written if they are not there yet.

    Raises:
        DataError: if there are no scans in the folder, or other phantoms.
    """
    from flap_nvflare.data.layouts import site_names

    root = desk.root(data)
    if isinstance(data, Phantoms):
        write_phantoms(root, data)
    return site_names(root)


def check_sites(cell: Cell, sites: Sequence[str], desk: Desk) -> None:
    """Refuses names of sites that the scans do not have, or that FLARE does not take.

    Raises:
        SettingsError: naming them.
    """
    ranks = cell.federation.site_ranks
    for what, named in (("attacks", cell.attacks), ("setting site_ranks", ranks)):
        if unknown := sorted(set(named) - set(sites)):
            raise SettingsError(f"{what}: no scans of sites {unknown}; expected some of {sites}")
    if cell.engine == SIMULATOR:
        from flap_nvflare.experiments.simulated import check_names

        check_names(sites, desk.folder(cell))


def run(cell: Cell, desk: Desk) -> dict[str, Any]:
    """Trains the cell, whose scans are there, and writes its figures for `kept` to find."""
    from flap_nvflare.adapter.update import write_atomic
    from flap_nvflare.data.layouts import site_names

    folder, root = desk.folder(cell), desk.root(cell.data)
    folder.mkdir(parents=True, exist_ok=True)
    sites = site_names(root)
    if cell.engine == SIMULATOR:
        from flap_nvflare.experiments.simulated import simulate

        figures = simulate(cell.federation, root, sites, folder, desk.threads)
    else:
        figures = _in_this_process(cell, root, sites, desk)
    figures = {**cell.made_with(), **figures, "versions": versions()}
    write_atomic(folder / CELL, (json.dumps(figures, indent=1) + "\n").encode())
    (folder / FAILED).unlink(missing_ok=True)
    return figures


def _in_this_process(cell: Cell, root: Path, sites: list[str], desk: Desk) -> dict[str, Any]:
    from flap_nvflare.in_process import run as train

    outcome = train(
        cell.mode,
        cell.federation,
        root,
        sites,
        curve=cell.curve,
        attacks=cell.attacks,
        cache=desk.scans / "cache",
        test_on={name: desk.root(data) for name, data in cell.test_on.items()},
    )
    return outcome.to_dict()


def versions() -> dict[str, str]:
    """What the figures were made with."""
    found = {name: metadata.version(name) for name in _VERSIONS}
    return {**found, "python": platform.python_version()}
