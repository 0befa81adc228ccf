"""IXI: T1 scans of the brain from three hospitals in London, named in the files' names.

    ROOT/7kd5wj7v7p-3/IXI_sample/IXI012-HH-1211/T1/IXI012-HH-1211*.nii.gz     as FLamby unzips
    ROOT/7kd5wj7v7p-3/IXI_sample/IXI012-HH-1211/label/IXI012-HH-1211*.nii.gz  its IXI Tiny
    ROOT/image/IXI012-HH-1211*.nii.gz, ROOT/label/IXI012-HH-1211*.nii.gz      TorchIO's IXITiny
    ROOT/IXI-T1/IXI012-HH-1211-T1.nii.gz, ROOT/label/IXI012-HH-1211*.nii.gz   IXI's own, own masks

A file is a case's by its name, wherever below the root; it is the mask if a folder above it, or
the end of its name, says label, mask or seg. Other weightings (T2, PD, MRA, DTI) are left alone.

FLamby's `metadata_tiny.csv`, in the root or below, gives the cases and the split of Fed-IXI: 249
training and 62 test cases of Guys, 145 and 36 of HH, 59 and 15 of IOP. **Without this table a fixed
fifth of each hospital is for testing: as many cases, but not the published ones.**
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flap_nvflare.data.cases import SPLITS, stay_within, stem
from flap_nvflare.data.entries import Entry
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.tables import read_rows

TABLE = "metadata_tiny.csv"
HOSPITALS = ("Guys", "HH", "IOP")  # in the order of the table's numbers
CLASS_NAMES = ("brain",)
COLUMNS = ("Patient ID", "Manufacturer", "Split")
_FILE = re.compile(r"(IXI(\d{3})-([A-Za-z]+)-(\d{4}))(?!\d)(.*)")
_MASK_FOLDER = re.compile(r"(label|mask|seg)(s|mentations?)?", re.IGNORECASE)
_MASK_NAME = re.compile(r".*[-_](label|mask|seg)(s|mentation)?", re.IGNORECASE)
_OTHER = re.compile(r"(?:IXI[-_])?(T2|PD|MRA|DTI)", re.IGNORECASE)


def is_ixi(root: Path) -> bool:
    """Whether a file below the root is one of IXI's by its name."""
    return next(_files(_folders(root)), None) is not None


def ixi_entries(root: Path) -> list[Entry]:
    """Every case of the root, in order of patients.

    Raises:
        DataError: if a file names an unknown hospital, or a hospital other than the table does, or
            the table cannot be used.
    """
    folders = list(_folders(root))
    found: dict[int, tuple[str, str, list[Path], list[Path]]] = {}
    for path, is_mask, match in _files(folders):
        name, patient, hospital = match[1], int(match[2]), match[3]
        if hospital not in HOSPITALS:
            raise DataError(
                f"{path}: unknown hospital {hospital!r} in the name; expected one of {HOSPITALS}"
            )
        _, _, scans, masks = found.setdefault(patient, (name, hospital, [], []))
        (masks if is_mask else scans).append(path)
    entries = {
        patient: _entry(name, hospital, "", tuple(scans), tuple(masks))
        for patient, (name, hospital, scans, masks) in sorted(found.items())
    }
    tables = [folder.path / TABLE for folder in folders if TABLE in folder.files]
    if len(tables) > 1:
        raise DataError(f"{tables[1]}: {tables[0]} is there as well; keep one of them")
    return _by_table(tables[0], entries) if tables else list(entries.values())


def _by_table(table: Path, found: dict[int, Entry]) -> list[Entry]:
    """The table's cases at hospitals that have any here; of those, missing ones as well."""
    here = {entry.site for entry in found.values()}
    seen: dict[int, int] = {}
    entries = []
    for line, (patient, number, split) in read_rows(table, COLUMNS, ""):
        place = f"{table}, line {line}"
        hospital = HOSPITALS[int(number)] if number in ("0", "1", "2") else ""
        if not patient.isdecimal() or not hospital or split not in SPLITS:
            raise DataError(
                f"{place}: {patient!r}, {number!r}, {split!r}; expected a patient's number, a "
                f"manufacturer 0, 1 or 2, and 'train' or 'test'"
            )
        key = int(patient)
        if key in seen:
            raise DataError(f"{place}: patient {key} is also in line {seen[key]}; keep one line")
        seen[key] = line
        entry = found.get(key)
        if entry is None:
            if hospital in here:
                entries.append(_entry(f"IXI{key:03d}-{hospital}", hospital, split, (), ()))
            continue
        if entry.site != hospital:
            raise DataError(
                f"{place}: manufacturer {number} is {hospital}, but the files are {entry.name}; "
                f"take FLamby's own table and IXI's own names"
            )
        entries.append(_entry(entry.name, hospital, split, entry.scans, entry.masks))
    return entries


def _entry(
    name: str, hospital: str, split: str, scans: tuple[Path, ...], masks: tuple[Path, ...]
) -> Entry:
    return Entry(
        name=name,
        site=hospital,
        split=split,
        scans=scans,
        masks=masks,
        scan_place=f"{name}*.nii.gz in a folder such as T1, image or IXI-T1",
        mask_place=f"{name}*.nii.gz in a folder 'label'",
    )


@dataclass(frozen=True)
class _Folder:
    """A folder below the root: where it is, the folders that lead there, its visible files."""

    path: Path
    parts: tuple[str, ...]
    files: list[str]


def _folders(root: Path) -> Iterator[_Folder]:
    """The visible folders of the root in order; one that is a link is not gone into."""

    def unreadable(error: OSError) -> None:  # its cases would be left out in silence
        raise DataError(f"{error.filename}: cannot be looked into ({error.strerror})") from error

    for place, folders, files in os.walk(root, onerror=unreadable):
        path = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (path / name).is_symlink():
                stay_within(root, path / name)
        visible = sorted(name for name in files if not name.startswith("."))
        yield _Folder(path, path.relative_to(root).parts, visible)


def _files(folders: Iterable[_Folder]) -> Iterator[tuple[Path, bool, re.Match[str]]]:
    """Files that are IXI's by their names, whether each is a mask, and the parts of its name."""
    for folder in folders:
        if any(map(_OTHER.fullmatch, folder.parts)):
            continue
        masks = any(map(_MASK_FOLDER.fullmatch, folder.parts))
        for name in folder.files:
            match = _FILE.fullmatch(stem(name))
            if match and not any(map(_OTHER.fullmatch, re.split(r"[-_]", match[5]))):
                is_mask = masks or _MASK_NAME.fullmatch(match[5]) is not None
                yield folder.path / name, is_mask, match
