"""A folder of synthetic scans on disk, in whatever layout: whose it is, and how files get there.

The manifest PHANTOM.json is the first file in such a folder and says what was drawn. A folder
without it that holds anything is somebody's and is never touched. Several processes may write
into one folder at the same time: files appear whole, and a scan never before its mask.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from flap_nvflare.data.cases import MANIFEST
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.place import place

# Scan (S, H, W), mask (S, H, W) uint8 on the same grid, affine (4, 4).
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PhantomCase:
    """A case to be drawn.

    Attributes:
        site: name of the site that it belongs to.
        image, label: files of scan and mask, relative to the folder, such as `A/scan.nii.gz`.
        draw: makes scan and mask; always the same ones.
        axes: where the axes run to in the files, as nibabel names it.
    """

    site: str
    image: str
    label: str
    draw: Callable[[], Drawn]
    axes: str = "IPL"


@dataclass(frozen=True)
class PhantomFolder:
    """All that a folder of synthetic scans holds beside its manifest.

    Attributes:
        version: of the drawing; raised when the same seed gives other bytes.
        sites: names of the sites in the order of the layout.
        cases: of all sites.
        tables: contents of the other files, by path relative to the folder.
        names: what is the phantoms' as a whole, relative to the folder: beside these files and
            folders nothing may lie. Below them nobody looks.
    """

    version: int
    sites: tuple[str, ...]
    cases: tuple[PhantomCase, ...]
    tables: Mapping[str, bytes]
    names: frozenset[str]


def write_folder(
    folder: Path,
    content: PhantomFolder,
    values: Mapping[str, object],
    only: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the tables, and the cases of some sites that are not there yet.

    Args:
        folder: made if missing; empty, or of an earlier call with the same values.
        content: what belongs into it.
        values: of the manifest, such as the seed: whatever the bytes of the cases depend on.
        only: names of the sites to write; None means all.
        progress: called with (cases done, cases in all) after each case.

    Raises:
        DataError: if the folder holds anything else or phantoms of other values, or if a site is
            unknown.
    """
    wanted = set(content.sites if only is None else only)
    unknown = sorted(wanted - set(content.sites))
    if unknown:
        raise DataError(f"no synthetic site {unknown}; expected some of {list(content.sites)}")
    claim(folder, {"version": content.version, **values}, {*content.names, *content.tables})
    for name, data in content.tables.items():
        place(folder / name, data)
    todo = [case for case in content.cases if case.site in wanted]
    for done, case in enumerate(todo, start=1):
        _write_case(folder, case)
        if progress is not None:
            progress(done, len(todo))


def claim(folder: Path, values: Mapping[str, object], names: Iterable[str]) -> None:
    """Makes the folder ours, or checks that it is; the manifest is the first file in it.

    Args:
        folder: made if missing.
        values: of the manifest, beside that it is synthetic.
        names: files and folders, relative to the folder, that may lie in it.

    Raises:
        DataError: if the manifest holds other values, or anything else lies there.
    """
    manifest = folder / MANIFEST
    ours = {"synthetic": True, **values}
    folder.mkdir(parents=True, exist_ok=True)
    # Names first, manifest second: whoever wrote a case meanwhile wrote the manifest before it.
    present = _visible(folder)
    if not manifest.is_file():
        _refuse_foreign(folder, present)
        place(manifest, json.dumps(ours, indent=2).encode(), only_if_missing=True)
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{manifest}: is no JSON ({error}); name another folder") from error
    if found != ours:
        raise DataError(
            f"{manifest}: the folder holds {found}, asked for {ours}; name another folder"
        )
    for inner, own in _own_names(names).items():
        if (folder / inner).is_dir():
            _refuse_foreign(folder / inner, _visible(folder / inner) - own)


def nifti_bytes(array: np.ndarray, affine: np.ndarray, axes: str) -> bytes:
    """A compressed NIfTI file in mm; without a time stamp, which would make equal files differ."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    nifti = nib.Nifti1Image(array, affine).as_reoriented(turn)
    nifti.header.set_xyzt_units("mm")
    return gzip.compress(nifti.to_bytes(), 1, mtime=0)


def _write_case(folder: Path, case: PhantomCase) -> None:
    """Draws and writes a case unless it is there; the mask first, so no scan is without one."""
    files = folder / case.label, folder / case.image
    if all(file.is_file() for file in files):
        return
    image, label, affine = case.draw()
    for file, array in zip(files, (label, image), strict=True):
        place(file, nifti_bytes(array, affine, case.axes))


def _own_names(names: Iterable[str]) -> dict[str, set[str]]:
    """For each folder that leads to one of the names: what may lie in it."""
    own: dict[str, set[str]] = {".": {MANIFEST}}
    for name in names:
        path = PurePosixPath(name)
        for part in (path, *path.parents):
            if part.name:
                own.setdefault(str(part.parent), set()).add(part.name)
    return own


def _visible(folder: Path) -> set[str]:
    """Names in the folder but for hidden ones, among which are files still being written."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def _refuse_foreign(folder: Path, foreign: set[str]) -> None:
    if foreign:
        named = ", ".join(sorted(foreign)[:3]) + (", …" if len(foreign) > 3 else "")
        raise DataError(
            f"{folder}: holds what is not synthetic: {named}; move it out or name an empty folder, "
            f"real scans are never overwritten"
        )
