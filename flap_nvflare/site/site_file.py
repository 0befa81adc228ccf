"""The site's own file, `local/flap_site.yaml` in its startup kit: what it has, what it allows.

    data_root: /data/kits
    checkpoint: /models/sam_vit_b_01ec64.pth
    limits:
      min_cases: 5
      methods: [flap, lora]

No job has a say in it, and none of it leaves the site.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flap_nvflare.settings import HARDWARE, SWITCHES, SettingsError, Site, switch
from flap_nvflare.site.limits import PLAIN_RANGES, Limits

__all__ = ["SITE_FILE", "Limits", "SiteFile", "parse_site_file", "read_site_file"]

SITE_FILE = "flap_site.yaml"
_NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9_.+-]*)?")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?|mps")


@dataclass(frozen=True)
class SiteFile:
    """All keys of the file; `settings.Site` describes those without a word here.

    Attributes:
        data_root, checkpoint, bundle, state_dir: full paths; None or empty where none is named.
        site: the site's name in its own table of cases, where that is not its name in FLARE.
        allow_synthetic: without `data_root`, whether the site may work on the demo's synthetic
            scans: for a rehearsal of a federation, never on its own.
        limits: what a job may ask of the site.
    """

    data_root: Path | None = None
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    bundle: Path | None = None
    device: str = "auto"
    state_dir: Path | None = None
    site: str = ""
    processes: int = 1
    cache_gb: float = Site.cache_gb
    workers: int = 0
    checkpointing: str = "auto"
    channels_last: str = "auto"
    packed: str = "auto"
    compile: str = "auto"
    own_process: str = "auto"
    allow_synthetic: bool = False
    limits: Limits = field(default_factory=Limits)

    def hardware(self) -> dict[str, Any]:
        """The arguments of `settings.Site` that say how this machine works."""
        names = ("device", "processes", "own_process", "cache_gb", "workers", *HARDWARE)
        return {name: getattr(self, name) for name in names}


def read_site_file(path: Path) -> SiteFile:
    """Reads and checks the file.

    Raises:
        SettingsError: naming file, key, value and mend.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}; mend the file") from error
    return parse_site_file(text, path)


def parse_site_file(text: str, path: Path) -> SiteFile:
    """Checks the text of the file that is, or will be, at `path`.

    Raises:
        SettingsError: naming file, key, value and mend.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: cannot be read as YAML: {error}; mend the file") from error
    values = _mapping(path, "", {} if values is None else values)
    for name in values:  # YAML takes the last one and says nothing
        if len(re.findall(rf"(?m)^{re.escape(name)}[ \t]*:", text)) > 1:
            raise SettingsError(f"{path}: {name} is there twice; keep one line of it")
    _known(path, "", values, [one.name for one in dataclasses.fields(SiteFile)])
    checked = {
        name: _READERS[name](path, name, value)
        for name, value in values.items()
        if value is not None  # a key with nothing behind it
    }
    found = SiteFile(**checked)
    try:  # what two keys mean together
        Site("site", Path(), **found.hardware())
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    return found


def _bad(path: Path, name: str, value: object, expected: str) -> SettingsError:
    return SettingsError(f"{path}: {name} is {value!r}; give {expected}")


def _mapping(path: Path, name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _bad(path, name or "the file", value, "lines of 'name: value'")
    return dict(value)


def _known(path: Path, place: str, values: Mapping[str, Any], names: list[str]) -> None:
    for name in values:
        if name not in names:
            raise SettingsError(
                f"{path}: {place}{name}: {values[name]!r} is not known; expected one of {names}"
            )


def _text(path: Path, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _bad(path, name, value, "text")
    return value.strip()


def _site(path: Path, name: str, value: object) -> str:
    text = str(value) if type(value) is int else _text(path, name, value)  # a site's number
    if not _NAME.fullmatch(text):  # it names a folder of the site's state
        raise _bad(path, name, value, "letters, digits, '_', '-', '.' and, to pool sites, '+'")
    return text


def _full_path(path: Path, name: str, value: object) -> Path | None:
    text = _text(path, name, value)
    if not text:
        return None
    found = Path(text)
    if not found.is_absolute():  # FLARE's processes start in folders of their own
        raise _bad(path, name, value, "a full path, which starts with /")
    return found


def _checkpoint(path: Path, name: str, value: object) -> str:
    return str(_full_path(path, name, value) or "")


def _sha256(path: Path, name: str, value: object) -> str:
    # YAML reads 64 digits without a letter as a number.
    text = f"{value:064d}" if type(value) is int else _text(path, name, value).lower()
    if not re.fullmatch(r"([0-9a-f]{64})?", text):
        raise _bad(path, name, value, "the 64 hexadecimal digits that sha256sum prints, in quotes")
    return text


def _device(path: Path, name: str, value: object) -> str:
    text = _text(path, name, value)
    if not _DEVICE.fullmatch(text):
        raise _bad(path, name, value, "cpu, cuda, cuda:1 (its number) or auto")
    return text


def _whole(path: Path, name: str, value: object) -> int:
    if type(value) is not int:
        raise _bad(path, name, value, "a whole number")
    return value


def _number(path: Path, name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _bad(path, name, value, "a number")
    return float(value)


def _switch(path: Path, name: str, value: object) -> str:
    if switch(value) not in SWITCHES:
        raise _bad(path, name, value, f"one of {SWITCHES}")
    return switch(value)


def _flag(path: Path, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _bad(path, name, value, "true or false")
    return value


def _limits(path: Path, name: str, value: object) -> Limits:
    values = _mapping(path, name, value)
    fields = {one.name for one in dataclasses.fields(Limits)}
    _known(path, f"{name}.", values, sorted(fields))
    given = {key: entry for key, entry in values.items() if entry is not None}
    for key in ("methods", "parameters"):
        if key in given:
            given[key] = _list(path, f"{name}.{key}", given[key])
    for key in ("ranges", "choices"):
        lists = _mapping(path, f"{name}.{key}", given.get(key, {}))
        given[key] = {
            one: _list(path, f"{name}.{key}.{one}", entry) for one, entry in lists.items()
        }
    given["ranges"] = {**PLAIN_RANGES, **given["ranges"]}
    try:
        return Limits(**given)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def _list(path: Path, name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _bad(path, name, value, "a list in brackets, such as [a, b]")
    return tuple(_as_number(entry) for entry in value)


def _as_number(value: object) -> object:
    """YAML reads 1e-4 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


_READERS: dict[str, Any] = {
    "data_root": _full_path,
    "checkpoint": _checkpoint,
    "checkpoint_sha256": _sha256,
    "bundle": _full_path,
    "device": _device,
    "state_dir": _full_path,
    "site": _site,
    "processes": _whole,
    "cache_gb": _number,
    "workers": _whole,
    **dict.fromkeys((*HARDWARE, "own_process"), _switch),
    "allow_synthetic": _flag,
    "limits": _limits,
}
