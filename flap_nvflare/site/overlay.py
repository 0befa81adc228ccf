"""Lays this package's policy over a FLARE startup kit, so that nothing in it is lost.

The files are those of the folder `custom` of the repository, which a wheel holds as
`flap_nvflare/site/custom`. A kit keeps FLARE's own settings; what the hospital has changed since
stays as it is; laying twice changes nothing more.

| in the kit | what happens |
|---|---|
| local/resources.json | FLARE's default, or the file there is, with ours merged over it |
| local/authorization.json | the same, and nobody may bring code |
| local/privacy.json | ours; one that the hospital changed or wrote is kept, unless forced |
| local/flap_site.yaml | ours; only lines whose value was given are changed later |
| local/custom/site_data.py | ours; one that the hospital changed is kept |
| flap/, flap/state/ | folders of mode 700 |

A server's kit gets the first two, with its jobs and snapshots inside the kit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flap_nvflare.settings import SettingsError
from flap_nvflare.site.kit import Kit, read_json
from flap_nvflare.site.merge import merged, without_custom_code
from flap_nvflare.site.site_file import SITE_FILE, parse_site_file

RESOURCES, AUTHORIZATION, PRIVACY = "resources.json", "authorization.json", "privacy.json"
STATE = "flap"  # folder of a kit for all that this package writes there
LAID = "laid.json"  # SHA-256 of each file as it was laid, to tell what was changed since
SOURCE = "custom/site_data.py"
_PLACE = "{kit}"
_SECRET, _FOLDER = 0o600, 0o700


@dataclass(frozen=True)
class Laid:
    """What became of a file.

    Attributes:
        path: the file in the kit, such as `local/privacy.json`.
        what: `wrote`, `updated`, `unchanged` or `kept` (the hospital's own stays).
        note: why, or what to do.
    """

    path: str
    what: str
    note: str = ""


@dataclass
class _Layer:
    """The files of one kit as they are laid."""

    kit: Kit
    force: bool
    record: dict[str, str] = field(default_factory=dict)
    found: list[Laid] = field(default_factory=list)

    def put(self, name: str, text: str, note: str = "") -> None:
        """Writes a file of the kit's folder `local`."""
        path = self.kit.local / name
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        what = "wrote" if before is None else "updated" if before != text else "unchanged"
        if what != "unchanged":
            _write(path, text, self.kit.folder)
        self.record[name] = _sha256(text)
        self.found.append(Laid(f"local/{name}", what, note if what != "unchanged" else ""))

    def changed_here(self, name: str) -> bool:
        """Whether a file that was laid before is not as it was laid."""
        path = self.kit.local / name
        if name not in self.record or not path.is_file():
            return False
        return _sha256(path.read_text(encoding="utf-8")) != self.record[name]

    def put_unless_changed(self, name: str, text: str, mend: str, forced: bool = False) -> None:
        """Writes it, but where the one there is not as it was laid."""
        path = self.kit.local / name
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if before is None or before == text or _sha256(before) == self.record.get(name):
            self.put(name, text)
        elif forced:
            aside = f"{name}.before"
            _write(self.kit.local / aside, before, self.kit.folder)
            self.put(name, text, f"the one there was is now local/{aside}")
        else:
            self.found.append(Laid(f"local/{name}", "kept", mend))


def overlay_folder() -> Path:
    """The overlay's files: in an installed package beside this file, else in the checkout.

    Raises:
        SettingsError: if neither is there.
    """
    here = Path(__file__).resolve()
    for folder in (here.parent / "custom", here.parents[2] / "custom"):
        if (folder / "local" / SITE_FILE).is_file():
            return folder
    raise SettingsError("the overlay's files are missing; install flap_nvflare again")


def lay(kit: Kit, values: Mapping[str, str] | None = None, force: bool = False) -> list[Laid]:
    """Lays the overlay.

    Args:
        kit: of a site or of the server.
        values: lines of `flap_site.yaml` to set, by key.
        force: replaces a `privacy.json` that is not this package's.

    Returns:
        What became of each file.

    Raises:
        SettingsError: if a file of the kit or a value is bad; nothing has been written then.
    """
    values = dict(values or {})
    if kit.server and values:
        raise SettingsError(
            f"{kit.folder}: a server's kit, which has no {SITE_FILE}; leave out {sorted(values)}"
        )
    ours = overlay_folder()
    state = kit.folder / STATE
    layer = _Layer(kit, force, _record(state / LAID))
    changed_here = layer.changed_here(RESOURCES)
    fragment = ours / ("server" if kit.server else "local") / RESOURCES
    files = {
        RESOURCES: _resources(kit, fragment, changed_here),
        AUTHORIZATION: without_custom_code(_own_or_default(kit, AUTHORIZATION)),
    }
    site_file = "" if kit.server else _site_file(kit, ours, values)
    for folder in (state, *(() if kit.server else (state / "state",))):
        _make_folder(folder, kit.folder)
    laid = layer.record.get(RESOURCES, "")
    for name, content in files.items():
        layer.put(name, json.dumps(content, indent=2) + "\n")
    if changed_here:  # and so it stays, at the next time as well
        layer.record[RESOURCES] = laid
    if not kit.server:
        mend = "not as it was laid; merge the new one by hand, or give --force"
        text = (ours / "local" / PRIVACY).read_text(encoding="utf-8")
        layer.put_unless_changed(PRIVACY, text, mend, force)
        _make_folder(kit.local / "custom", kit.folder)
        text = (ours / "site_data.py").read_text(encoding="utf-8")
        layer.put_unless_changed(SOURCE, text, "changed at this site")
        layer.put(SITE_FILE, site_file)
    _write(state / LAID, json.dumps(layer.record, indent=2, sort_keys=True) + "\n", kit.folder)
    return layer.found


def _own_or_default(kit: Kit, name: str) -> dict[str, Any]:
    own = kit.local / name
    return read_json(own if own.is_file() else kit.local / f"{name}.default")


def _resources(kit: Kit, fragment: Path, changed_here: bool) -> dict[str, Any]:
    """FLARE's file with the package's fragment; what was changed since it was laid stays so."""
    # As JSON text: a folder's name may hold what JSON has to escape.
    place = json.dumps(str(kit.folder.resolve()))[1:-1]
    values = json.loads(fragment.read_text(encoding="utf-8").replace(_PLACE, place))
    own = _own_or_default(kit, RESOURCES)
    result = merged(own, values)
    return merged(result, own) if changed_here else result


def _site_file(kit: Kit, ours: Path, values: dict[str, str]) -> str:
    """The text of the site's file with the given values."""
    path = kit.local / SITE_FILE
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        text = (ours / "local" / SITE_FILE).read_text(encoding="utf-8")
        values.setdefault("state_dir", str(kit.folder.resolve() / STATE / "state"))
    for name, value in values.items():
        text = _with_line(text, name, value)
    parse_site_file(text, path)
    return text


def _with_line(text: str, name: str, value: str) -> str:
    """The text with a line `name: value` in the place of the one in force, else of a remark."""
    line = f"{name}: {json.dumps(value)}"  # a JSON string is a YAML string
    for before in ("", "# "):
        changed, times = re.subn(rf"(?m)^{before}{name}:.*$", lambda _: line, text, count=1)
        if times:
            return changed
    return f"{text.rstrip()}\n{line}\n"


def _record(path: Path) -> dict[str, str]:
    return {name: str(value) for name, value in read_json(path).items()} if path.is_file() else {}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _make_folder(folder: Path, kit: Path) -> None:
    folder.mkdir(exist_ok=True)
    folder.chmod(_FOLDER)
    _give(folder, kit)


def _write(path: Path, text: str, kit: Path) -> None:
    """Puts the text there, whole or not at all, for the kit's owner alone to read."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _SECRET), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _give(beside, kit)
    beside.replace(path)


def _give(path: Path, kit: Path) -> None:
    """What root writes belongs to the kit's owner, as whom FLARE runs."""
    if os.geteuid() == 0:
        owner = kit.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
