"""The lines of a file of experiments: known names, values of the right types, nothing twice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flap_nvflare.settings import SettingsError

_LINES = "lines of 'name: value'"


@dataclass(frozen=True)
class Row:
    """One named way to train.

    Attributes:
        name: empty in a file without rows.
        mode: how it is trained.
        settings: of the federation, over the file's.
        attacks: kind of attack by hostile site.
    """

    name: str = ""
    mode: str = "federated"
    settings: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GridFile:
    """What the file says, line by line; a line without a value has its default.

    Raises:
        SettingsError: on a value of another type, an axis without values or with one twice, or
            something that follows what is no value of its axis.
    """

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

    def __post_init__(self) -> None:
        whole = bool(self.seeds) and all(type(seed) is int for seed in self.seeds)
        expect(whole and _differ(self.seeds), "seeds", self.seeds, "different whole numbers")
        for axis, values in self.vary.items():
            fits = isinstance(values, list) and bool(values) and _differ(values)
            expect(fits, f"vary: {axis}", values, "a list of different values")
        for axis, by_value in self.follow.items():
            expect(axis in self.vary, "follow", axis, f"one of the axes {tuple(self.vary)}")
            expect(isinstance(by_value, Mapping), f"follow: {axis}", by_value, "settings by value")
            for value, settings in by_value.items():
                known = any(_same(value, one) for one in self.vary[axis])
                wanted = f"a value of the axis, as it stands there: {self.vary[axis]}"
                expect(known, f"follow: {axis}", value, wanted)
                named(f"follow: {axis}: {value}", settings)

    @classmethod
    def read(cls, path: Path) -> GridFile:
        """Reads the file.

        Raises:
            SettingsError: if it is no YAML, or holds something else than these lines.
        """
        try:
            values = _load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingsError(f"cannot be read as YAML: {error}") from error
        defaults = {one.name: getattr(cls(), one.name) for one in dataclasses.fields(cls)}
        found: dict[str, Any] = {}
        for name, value in named("the file", values).items():
            expect(name in defaults, "line", name, f"one of {tuple(defaults)}")
            kind = type(defaults[name])
            if kind is dict:
                found[name] = named(name, value)
            elif value is not None:
                kind = list if kind is tuple else kind
                expect(isinstance(value, kind), name, value, f"a value of type {kind.__name__}")
                found[name] = value
        return cls(**found)

    def each_row(self) -> list[Row]:
        """The rows; one without a name if there are none."""
        return [_row(name, values) for name, values in self.rows.items()] or [Row()]

    def following(self, axis: str, value: Any) -> Mapping[str, Any]:
        """What else changes with a value of an axis."""
        by_value: Mapping[Any, Any] = self.follow.get(axis, {})
        return next((found or {} for key, found in by_value.items() if _same(key, value)), {})


def _row(name: str, values: Any) -> Row:
    values = named(f"rows: {name}", values)
    extra = sorted(set(values) - {"mode", "settings", "attacks"})
    expect(not extra, f"rows: {name}", extra, "mode, settings or attacks")
    return Row(
        name,
        values.get("mode") or "federated",
        named(f"rows: {name}: settings", values.get("settings")),
        named(f"rows: {name}: attacks", values.get("attacks")),
    )


def named(what: str, values: Any) -> dict[str, Any]:
    """Values by name; none where nothing is said.

    Raises:
        SettingsError: on anything else.
    """
    expect(values is None or isinstance(values, Mapping), what, values, _LINES)
    return {str(name): value for name, value in (values or {}).items()}


def expect(holds: bool, what: str, value: object, expected: str) -> None:
    """Refuses a value.

    Raises:
        SettingsError: naming what it is of and what is expected, unless `holds`.
    """
    if not holds:
        raise SettingsError(f"{what}: {str(value)[:200]!r} is not allowed; expected {expected}")


def _same(one: Any, other: Any) -> bool:
    """Whether two values of YAML are one: 0 and 0.0 are, 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _differ(values: Sequence[Any]) -> bool:
    return not any(_same(one, other) for one, other in itertools.combinations(values, 2))


class _Loader(yaml.SafeLoader):
    """PyYAML's, which of a name that stands twice would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} stands here twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
