"""A file of experiments, and the cells that it stands for.

    about: Do low-rank adapters or all weights use more cases better?
    data: {kind: kits, sites: 3}       # knobs of the phantoms, or {root: FOLDER}
    settings: {rounds: 4}              # of the federation, over its defaults
    vary:                              # every value of each with every value of all others
      data.train: [4, 8]
      method: [flap, full]
    follow:                            # what else changes with a value
      method: {full: {learning_rate: 0.002}}
    seeds: [0, 1, 2]

Where a product is not what is wanted, `rows` names ways to train one by one, each with its own
settings, mode and hostile sites; with `vary` as well, each row is run for every point.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flap_nvflare.attack import ATTACKS
from flap_nvflare.data.phantoms import Phantoms
from flap_nvflare.experiments.show import Show
from flap_nvflare.settings import Federation, SettingsError

MODES = ("federated", "alone", "pooled")
ENGINES = ("process", "simulator")
DATA = "data."  # before an axis that is a knob of the phantoms
MODE = "mode"
GRIDS = Path(__file__).parent / "grids"


@dataclass(frozen=True)
class Cell:
    """One training of a grid.

    Attributes:
        name: of its row; empty in a grid without rows.
        mode: one of `MODES`.
        varied: value of each axis.
        federation: the settings, seed included.
        data: the phantoms, or the folder of scans.
        attacks: kind of attack by hostile site.
        test_on: further data by name, on whose test cases the adapter is scored as well.
        engine: what runs it: this process, or FLARE's simulator.
        curve: whether every round is scored on the validation cases.
    """

    name: str
    mode: str
    varied: Mapping[str, Any]
    federation: Federation
    data: Phantoms | Path
    attacks: Mapping[str, str] = field(default_factory=dict)
    test_on: Mapping[str, Phantoms | Path] = field(default_factory=dict)
    engine: str = "process"
    curve: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and another one for every cell of a grid."""
        parts = [self.name] if self.name else []
        parts += [f"{key.removeprefix(DATA)}={value}" for key, value in self.varied.items()]
        parts.append(f"seed={self.federation.seed}")
        return re.sub(r"[^\w.=+-]+", "_", "_".join(parts))

    def made_with(self) -> dict[str, Any]:
        """All that decides its figures, as plain values."""
        return {
            "name": self.name,
            "mode": self.mode,
            "varied": dict(self.varied),
            "seed": self.federation.seed,
            "engine": self.engine,
            "federation": self.federation.to_dict(),
            "data": data_values(self.data),
            "attacks": dict(self.attacks),
            "test_on": {name: data_values(data) for name, data in self.test_on.items()},
        }


@dataclass(frozen=True)
class Grid:
    """A file of experiments.

    Attributes:
        name: the file's name without its ending.
        about: the question, in a sentence.
        cells: what is to be trained, in the order of the file, seed by seed.
        show: the table and the plots.
    """

    name: str
    about: str
    cells: tuple[Cell, ...]
    show: Show


def data_values(data: Phantoms | Path) -> dict[str, Any]:
    """Where scans come from, as plain values."""
    return {"root": str(data)} if isinstance(data, Path) else dataclasses.asdict(data)


def find_grid(named: str) -> Path:
    """The file of that path, or of that name among the package's own.

    Raises:
        SettingsError: if there is neither.
    """
    for path in (Path(named), GRIDS / f"{named}.yaml"):
        if path.is_file():
            return path
    ours = ", ".join(sorted(path.stem for path in GRIDS.glob("*.yaml")))
    raise SettingsError(f"{named}: no such file, and none of the package's own grids: {ours}")


def read_grid(path: Path, settings: Mapping[str, Any] | None = None) -> Grid:
    """Reads and checks a file of experiments; nothing is run.

    Args:
        path: the file.
        settings: changes of the federation for every cell, over the file's own `settings`.

    Raises:
        SettingsError: naming the file, what is wrong in it and what is expected.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read as YAML: {error}") from error
    try:
        return _grid(path.stem, _File.of(values), settings or {})
    except (SettingsError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _File:
    """The lines of a file of experiments, of the right types."""

    about: str = ""
    engine: str = "process"
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, Any] = field(default_factory=dict)
    follow: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    test_on: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    curve: bool = False
    show: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Any) -> _File:
        defaults = {one.name: getattr(cls(), one.name) for one in dataclasses.fields(cls)}
        _expect(isinstance(values, Mapping), "the file", values, "lines of 'name: value'")
        for name, value in values.items():
            _expect(name in defaults, "line", name, f"one of {tuple(defaults)}")
            default = defaults[name]
            kind = list if isinstance(default, tuple) else type(default)
            _expect(isinstance(value, kind), name, value, f"a value of type {kind.__name__}")
        return cls(**values)


def _grid(name: str, file: _File, settings: Mapping[str, Any]) -> Grid:
    _expect(file.engine in ENGINES, "engine", file.engine, f"one of {ENGINES}")
    seeds = file.seeds
    whole = all(type(seed) is int for seed in seeds)
    _expect(
        bool(seeds) and whole and len(set(seeds)) == len(seeds), "seeds", seeds, "whole numbers"
    )
    for axis, choices in file.vary.items():
        fits = isinstance(choices, list) and choices
        _expect(bool(fits), f"vary: {axis}", choices, "a list of its values")
    for axis in file.follow:
        _expect(axis in file.vary, "follow", axis, f"one of the axes {tuple(file.vary)}")
    test_on = {name: _data(values) for name, values in file.test_on.items()}
    cells = [
        _cell(file, settings, row, point, seed, test_on)
        for seed in seeds
        for row in _rows(file)
        for point in _points(file.vary)
    ]
    _refuse_twins(cells)
    return Grid(name, file.about, tuple(cells), Show.of(file.show))


@dataclass(frozen=True)
class _Row:
    """One named way to train."""

    name: str = ""
    mode: str = "federated"
    settings: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, str] = field(default_factory=dict)


def _rows(file: _File) -> Iterator[_Row]:
    if not file.rows:
        yield _Row()
    for name, values in file.rows.items():
        values = values or {}
        _expect(isinstance(values, Mapping), f"rows: {name}", values, "lines of 'name: value'")
        extra = set(values) - {"mode", "settings", "attacks"}
        _expect(not extra, f"rows: {name}", sorted(extra), "mode, settings or attacks")
        yield _Row(str(name), **values)


def _points(vary: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*vary.values()):
        yield dict(zip(vary, values, strict=True))


def _cell(
    file: _File,
    settings: Mapping[str, Any],
    row: _Row,
    point: Mapping[str, Any],
    seed: int,
    test_on: Mapping[str, Phantoms | Path],
) -> Cell:
    changes = {**file.settings, **settings, **row.settings}
    knobs, mode = dict(file.data), row.mode
    for axis, value in point.items():
        following = (file.follow.get(axis) or {}).get(value) or {}
        _expect(isinstance(following, Mapping), f"follow: {axis}", following, "settings by value")
        for name, one in {axis: value, **following}.items():
            if name.startswith(DATA):
                knobs[name.removeprefix(DATA)] = one
            elif name == MODE:
                mode = one
            else:
                changes[name] = one
    _expect("seed" not in changes, "setting seed", changes.get("seed"), "it under `seeds`")
    _expect(mode in MODES, MODE, mode, f"one of {MODES}")
    for site, kind in row.attacks.items():
        _expect(kind in ATTACKS, f"attacks of site {site}", kind, f"one of {ATTACKS}")
    _expect(mode == "federated" or not row.attacks, "attacks", mode, "mode federated beside them")
    federation = Federation.from_dict({**changes, "seed": seed})
    engine = file.engine if mode == "federated" else "process"
    data = _data(knobs)
    return Cell(row.name, mode, point, federation, data, row.attacks, test_on, engine, file.curve)


def _data(values: Any) -> Phantoms | Path:
    """The phantoms of these knobs, or a folder of scans."""
    _expect(isinstance(values, Mapping), "data", values, "root: FOLDER, or knobs of the phantoms")
    if "root" in values:
        _expect(len(values) == 1, "data", sorted(values), "root alone: its scans are as they are")
        return Path(str(values["root"])).expanduser()
    known = {one.name for one in dataclasses.fields(Phantoms)}
    for name in values:
        _expect(name in known, "data", name, f"root, or one of {sorted(known)}")
    return Phantoms(**values)


def _refuse_twins(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.folder in seen:
            raise SettingsError(f"two cells are {cell.folder!r}; give their rows other names")
        seen[cell.folder] = cell


def _expect(holds: bool, what: str, value: object, expected: str) -> None:
    if not holds:
        raise SettingsError(f"{what}: {str(value)[:200]!r} is not allowed; expected {expected}")
