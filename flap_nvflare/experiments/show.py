"""What a grid shows: the columns of its table, and its plots."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flap_nvflare.experiments.grid_file import expect, named
from flap_nvflare.settings import SettingsError

COLUMNS = (
    "parameters",
    "classes",
    "mean",
    "worst site",
    "gain",
    "up",
    "down",
    "total",
    "of full",
    "error",
    "server seconds",
    "seconds",
    "elsewhere",
)
SPREADS = ("interval", "deviation")
# Kinds of plots, and what each may be told.
PLOTS: Mapping[str, tuple[str, ...]] = {
    "lines": ("x", "series", "of", "x_title"),
    "bars": ("of",),
    "matrix": (),
    "figure_one": ("by",),
}
_NAME = re.compile(r"\w[\w.-]{0,63}")  # it becomes a file's


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
        kind: one of `PLOTS`.
        options: what the plot is told besides, such as `x` and `series` of lines.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Show:
    """Columns of the table and plots of a grid.

    Attributes:
        columns: some of `COLUMNS`, in their order in the table.
        spread: what stands behind `±`: half of the 95 % interval of the mean over seeds by
            Student's t, or the standard deviation over seeds.
        plots: the pictures by name.
    """

    columns: tuple[str, ...] = ("classes", "mean", "worst site")
    spread: str = "interval"
    plots: Mapping[str, Plot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column in self.columns:
            if column not in COLUMNS:
                raise SettingsError(f"show: column {column!r} is not one of {COLUMNS}")
        if self.spread not in SPREADS:
            raise SettingsError(f"show: spread {self.spread!r} is not one of {SPREADS}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Show:
        """Reads the lines `columns`, `spread` and `plots` of a grid.

        Raises:
            SettingsError: on another line, an unknown column or an unknown plot.
        """
        known = {one.name for one in dataclasses.fields(cls)}
        if extra := set(values) - known:
            raise SettingsError(f"show: {sorted(extra)} is not allowed; expected {sorted(known)}")
        plots = {}
        for name, options in named("show: plots", values.get("plots")).items():
            expect(bool(_NAME.fullmatch(name)), "show: plot", name, "letters, digits, _, - and .")
            kind = str(options.get("kind")) if isinstance(options, Mapping) else ""
            if kind not in PLOTS:
                kinds = tuple(PLOTS)
                raise SettingsError(f"show: plot {name!r} has kind {kind!r}, not one of {kinds}")
            rest = {key: value for key, value in options.items() if key != "kind"}
            for key in rest:
                if key not in PLOTS[kind]:
                    told = PLOTS[kind] or "no more than its kind"
                    raise SettingsError(f"show: plot {name!r} is told {key!r}, expected {told}")
            plots[name] = Plot(kind, rest)
        columns = values.get("columns") or list(cls.columns)
        expect(isinstance(columns, list), "show: columns", columns, f"a list of {COLUMNS}")
        return cls(tuple(columns), values.get("spread", cls.spread), plots)
