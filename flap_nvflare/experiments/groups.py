"""Cells that differ in the seed alone are one row of a table and one point of a plot.

A cell is what its `cell.json` holds. Dice are shares of 1 here, percent where they are shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flap_nvflare.report.units import plain_text

Cell = Mapping[str, Any]
FEDERATED, ALONE, POOLED = "federated", "alone", "pooled"
MODES = {FEDERATED: "federated", ALONE: "each site alone", POOLED: "pooled data"}  # as shown
PROCESS, SIMULATOR = "process", "simulator"  # engines: here, or under FLARE
MODE = "mode"  # may be an axis as well
WORST = "worst site"
DATA = "data."  # before an axis that is a knob of the scans
# Settings of what happens between sites, or after the training.
_OF_THE_FEDERATION = {
    "rule", "gauge", "moments", "energy", "hostile", "site_ranks", "optimizer", "proximal_weight",
    "proximal_on", "server_rate", "server_momentum", "personal", "ditto_weight", "sites_per_round",
    "upload", "download", "dp_clip", "dp_noise", "dp_delta", "encryption", "weight_by",
    "min_sites", "train_timeout", "straggler_wait", "cross_site", "tracking",
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The cells of one name, mode and point of the grid, one a seed.

    Attributes:
        cells: at least one, in the order in which they came.
    """

    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """The row's name; empty in a grid without."""
        return str(self.cells[0]["name"] or "")

    @property
    def mode(self) -> str:
        """`federated`, `alone` or `pooled`."""
        return str(self.cells[0]["mode"])

    @property
    def varied(self) -> Mapping[str, Any]:
        """Value by axis."""
        varied: Mapping[str, Any] = self.cells[0]["varied"]
        return varied

    def dice(self, name: str) -> list[float | None]:
        """Of a class, of their `mean`, or of the `worst site`, one a cell."""
        return [dice(cell, name) for cell in self.cells]

    def gains(self, cells: Sequence[Cell]) -> list[float | None]:
        """By how much each cell's mean Dice is above that of its sites alone, same seed."""
        return [gain(cell, cells) for cell in self.cells]


def grouped(cells: Sequence[Cell]) -> list[Group]:
    """The groups, in the order in which the cells first show them.

    Raises:
        ValueError: if there are no cells, or two of one group have the same seed.
    """
    if not cells:
        raise ValueError("no cell of the grid has been run yet: there is nothing to show")
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        own = found.setdefault(_text([cell["name"], cell["mode"], cell["varied"]]), [])
        if any(other["seed"] == cell["seed"] for other in own):
            raise ValueError(
                f"two cells have the name {cell['name']!r}, mode {cell['mode']!r}, values "
                f"{dict(cell['varied'])} and seed {cell['seed']}: leave one out"
            )
        own.append(cell)
    return [Group(tuple(own)) for own in found.values()]


def dice(cell: Cell, name: str) -> float | None:
    """Dice of a class, of their `mean`, or of the `worst site`, which is the lowest mean."""
    if name != WORST:
        value: float | None = cell["mean"].get(name)
        return value
    known = [site["mean"] for site in cell["sites"].values() if site.get("mean") is not None]
    return min(known, default=None)


def gain(cell: Cell, cells: Sequence[Cell]) -> float | None:
    """A federation's mean Dice less that of its sites alone; None if nobody has trained alone.

    The partner among `cells` has the same seed and values. Unless the mode is an axis, it has the
    same settings as well, but for those that a site alone has no use for; where several have, as
    rows of their own name may, all settings.
    """
    if cell["mode"] != FEDERATED:
        return None
    alone = [one for one in cells if one["mode"] == ALONE]
    partners = [one for one in alone if _partner_key(one) == _partner_key(cell)]
    if len(partners) > 1:
        settings = _text(cell["federation"])
        partners = [one for one in partners if _text(one["federation"]) == settings]
    together = dice(cell, "mean")
    own = dice(partners[0], "mean") if len(partners) == 1 else None
    return None if together is None or own is None else together - own


def elsewhere(group: Group, test: str) -> list[float | None]:
    """Mean Dice on another test set, one a cell."""
    return [((cell.get("elsewhere") or {}).get(test) or {}).get("mean") for cell in group.cells]


def synthetic(cells: Sequence[Cell]) -> bool:
    """Whether any of the scans are: as `data` says, or because it names phantoms, not a folder."""
    return any(
        data.get("synthetic", bool(data) and "root" not in data)
        for data in (cell.get("data") or {} for cell in cells)
    )


def seeds_text(cells: Sequence[Cell]) -> str:
    """All seeds in order: "seeds 0, 1, 2"."""
    seeds = sorted({cell["seed"] for cell in cells})
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def axes(groups: Sequence[Group]) -> list[str]:
    """Names of all axes, in their order."""
    return list(dict.fromkeys(name for group in groups for name in group.varied))


def axis_title(name: str) -> str:
    """An axis as a reader wants it: "lora_blocks" as "lora blocks", "data.train" as "train"."""
    return name.removeprefix(DATA).replace("_", " ")


def value_text(axis: str, value: Any) -> str:
    """A value of an axis as a reader wants it."""
    return MODES.get(value, str(value)) if axis == MODE else plain_text(value)


def value_label(axis: str, value: Any) -> str:
    """A value that says of what it is: "flap", but "rank 8"."""
    named = f"{axis_title(axis)} " if isinstance(value, (int, float)) else ""
    return named + value_text(axis, value)


def labels(groups: Sequence[Group], but: Sequence[str] = ()) -> list[str]:
    """The shortest name that tells each group from the others.

    Its own name; else what differs of the values, without the axes `but`, and of the modes.
    """
    names = [group.name for group in groups]
    if all(names) and len(set(names)) == len(names):
        return names
    told = [axis for axis in axes(groups) if axis not in but and _differs(groups, axis)]
    modes = MODE not in axes(groups) and len({group.mode for group in groups}) > 1
    return [_label(group, told, modes) or MODES[group.mode] for group in groups]


def _label(group: Group, told: Sequence[str], modes: bool) -> str:
    parts = [group.name] if group.name else []
    parts += [value_label(axis, group.varied[axis]) for axis in told if axis in group.varied]
    if modes and group.mode != FEDERATED and group.mode not in group.name:
        parts.append(MODES[group.mode])
    return ", ".join(parts)


def _differs(groups: Sequence[Group], axis: str) -> bool:
    return len({_text(group.varied.get(axis)) for group in groups}) > 1


def _partner_key(cell: Cell) -> str:
    """What a federation and its sites alone have in common.

    Where the mode is an axis, the grid says itself which cells belong together, and what follows
    a mode, such as another learning rate, is its own.
    """
    values = {axis: value for axis, value in cell["varied"].items() if axis != MODE}
    if MODE in cell["varied"]:
        return _text([cell["seed"], values, cell["name"]])
    settings = {
        name: value for name, value in cell["federation"].items() if name not in _OF_THE_FEDERATION
    }
    return _text([cell["seed"], values, settings])


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
