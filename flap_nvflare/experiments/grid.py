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
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flap_nvflare.attack import ATTACKS
from flap_nvflare.data.phantoms import Phantoms
from flap_nvflare.experiments.grid_file import GridFile, Row, expect, named
from flap_nvflare.experiments.groups import (
    ALONE,
    DATA,
    FEDERATED,
    MODE,
    MODES,
    PROCESS,
    SIMULATOR,
    WORST,
)
from flap_nvflare.experiments.show import Show
from flap_nvflare.settings import Federation, SettingsError

ENGINES = (PROCESS, SIMULATOR)
GRIDS = Path(__file__).parent / "grids"
_LONGEST = 120  # characters of a folder's name; a file system takes 255 bytes


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
    engine: str = PROCESS
    curve: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder: readable, short, and another one for every cell of a grid."""
        parts = [self.name] if self.name else []
        parts += [f"{key.removeprefix(DATA)}={value}" for key, value in self.varied.items()]
        parts.append(f"seed={self.federation.seed}")
        whole = "_".join(parts)
        plain = re.sub(r"[^\w.=+-]+", "_", whole)
        if len(plain) <= _LONGEST:
            return plain
        return f"{plain[:_LONGEST]}_{hashlib.sha256(whole.encode()).hexdigest()[:8]}"

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
        return _grid(path.stem, GridFile.read(path), settings or {})
    except (SettingsError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error


def _grid(name: str, file: GridFile, settings: Mapping[str, Any]) -> Grid:
    expect(file.engine in ENGINES, "engine", file.engine, f"one of {ENGINES}")
    for changed in settings:
        own = changed in file.vary or all(changed in row.settings for row in file.each_row())
        expect(not own, "--set", changed, "what the grid does not say for every cell by itself")
    test_on = {key: _data(values) for key, values in file.test_on.items()}
    cells = tuple(
        _cell(file, settings, row, point, seed, test_on)
        for seed in file.seeds
        for row in file.each_row()
        for point in _points(file.vary)
    )
    _refuse_twins(cells)
    show = Show.of(file.show)
    _check_plots(show, file, cells)
    return Grid(name, file.about, cells, show)


def _points(vary: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*vary.values()):
        yield dict(zip(vary, values, strict=True))


def _cell(
    file: GridFile,
    settings: Mapping[str, Any],
    row: Row,
    point: Mapping[str, Any],
    seed: int,
    test_on: Mapping[str, Phantoms | Path],
) -> Cell:
    changes = {**file.settings, **settings, **row.settings}
    knobs, mode = dict(file.data), row.mode
    for axis, value in point.items():
        for name, one in {axis: value, **file.following(axis, value)}.items():
            if name.startswith(DATA):
                knobs[name.removeprefix(DATA)] = one
            elif name == MODE:
                mode = one
            else:
                changes[name] = one
    expect("seed" not in changes, "setting seed", changes.get("seed"), "it under `seeds`")
    expect(mode in tuple(MODES), MODE, mode, f"one of {tuple(MODES)}")
    federation = Federation.from_dict({**changes, "seed": seed})
    engine = file.engine if mode == FEDERATED else PROCESS
    data = _data(knobs)
    cell = Cell(row.name, mode, point, federation, data, row.attacks, test_on, engine, file.curve)
    _check_possible(cell)
    return cell


def _check_possible(cell: Cell) -> None:
    """Refuses what the cell's mode or engine would leave out, or could not do."""
    for site, kind in cell.attacks.items():
        expect(kind in ATTACKS, f"attacks of site {site}", kind, f"one of {ATTACKS}")
    federated, simulated = cell.mode == FEDERATED, cell.engine == SIMULATOR
    expect(federated or not cell.attacks, "attacks", cell.mode, "mode federated beside them")
    expect(cell.mode != ALONE or not cell.test_on, "test_on", ALONE, "another mode beside it")
    for name in ("attacks", "test_on", "curve"):
        asked = bool(getattr(cell, name))
        expect(not (simulated and asked), "engine", SIMULATOR, f"engine: {PROCESS} for {name}")
    encryption = cell.federation.encryption
    plain = simulated or encryption == "none"
    expect(plain, "setting encryption", encryption, f"'none', or engine: {SIMULATOR}")


def _check_plots(show: Show, file: GridFile, cells: Sequence[Cell]) -> None:
    """Refuses before the training what could not be drawn after it."""
    classes = {name for cell in cells for name in cell.federation.class_names}
    figures = ("mean", WORST, *sorted(classes))
    for name, plot in show.plots.items():
        what = f"show: plot {name}"
        for option in ("x", "series", "by"):
            axis = plot.options.get(option)
            lacks = axis is None and not (option == "x" and plot.kind == "lines")
            expected = f"one of the axes {tuple(file.vary)}"
            expect(lacks or axis in tuple(file.vary), f"{what}: {option}", axis, expected)
        of = plot.options.get("of", "mean")
        for one in of if isinstance(of, list) and plot.kind == "bars" else [of]:
            expect(one in figures, f"{what}: of", one, f"one of {figures}")
        tests = plot.kind != "matrix" or bool(file.test_on)
        expect(tests, what, plot.kind, "further data in test_on for it")


def _data(values: Any) -> Phantoms | Path:
    """The phantoms of these knobs, or a folder of scans."""
    values = named("data", values)
    if "root" in values:
        expect(len(values) == 1, "data", sorted(values), "root alone: its scans are as they are")
        return Path(str(values["root"])).expanduser().absolute()
    known = data_values(Phantoms())
    for name, value in values.items():
        expect(name in known, "data", name, f"root, or one of {sorted(known)}")
        kinds = (int, float) if isinstance(known[name], float) else (type(known[name]),)
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        expect(fits, f"data: {name}", value, f"a value like {known[name]!r}")
        values[name] = kinds[-1](value)
    return Phantoms(**values)


def _refuse_twins(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.folder in seen:
            raise SettingsError(f"two cells are {cell.folder!r}; give their rows other names")
        seen[cell.folder] = cell
