"""nnU-Net's layout, versions 1 and 2, and that of the Medical Segmentation Decathlon.

    ROOT/dataset.json
    ROOT/imagesTr/la_003_0000.nii.gz     nnU-Net; the Decathlon: la_003.nii.gz
    ROOT/labelsTr/la_003.nii.gz
    ROOT/imagesTs, ROOT/labelsTs         test cases, where their masks are given as well

Of a set with several channels, or with several in one 4D file, no case is taken: the network sees
one. Which hospital a case is of, the layout does not say: our own table `sites.csv` does. Test
scans without a mask serve nobody here and are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flap_nvflare.data.cases import ENDINGS, stay_within, stem
from flap_nvflare.data.entries import Entry
from flap_nvflare.data.errors import DataError

DESCRIPTION = "dataset.json"
_CHANNEL = re.compile(r"(.+)_(\d{4})")


def is_nnunet(root: Path) -> bool:
    """Whether its description or one of its folders is there."""
    return (root / DESCRIPTION).is_file() or (root / "imagesTr").is_dir()


def nnunet_entries(root: Path) -> list[Entry]:
    """Every case with a mask, and every training case, in order of their names; none has a site.

    Raises:
        DataError: if the description is missing, cannot be used or names several channels, or a
            case is both for training and for testing.
    """
    train = _folder(root, "Tr", _listed(_described(root)))
    test = [entry for entry in _folder(root, "Ts", []) if entry.masks]
    both = {entry.name for entry in train} & {entry.name for entry in test}
    if both:
        raise DataError(
            f"{root}: case {min(both)} is in labelsTr and in labelsTs; keep it in one of them"
        )
    # Without any, a fixed fifth will be for testing: see `entries.assigned`.
    train = [replace(entry, split="train") for entry in train] if test else train
    return sorted([*train, *test], key=lambda entry: entry.name)


def nnunet_class_names(root: Path) -> tuple[str, ...]:
    """The foreground classes of the description, label 1 first.

    Version 1 and the Decathlon write `{"1": "liver"}`, version 2 `{"liver": 1}`.

    Raises:
        DataError: if labels do not run from 0, a class has several (a region), or one says which
            voxels are not to be looked at.
    """
    labels = _described(root).get("labels")
    names: dict[int, str] = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        number, name = (key, value) if str(key).isdecimal() else (value, key)
        if isinstance(number, bool) or not str(number).isdecimal() or not isinstance(name, str):
            raise DataError(
                f"{root / DESCRIPTION}: label {key!r}: {value!r}; expected one number a class; a "
                f"class of several labels (a region) is not read"
            )
        if name == "ignore":
            raise DataError(
                f"{root / DESCRIPTION}: label {number} is 'ignore'; every voxel counts here: "
                f"make a copy of the set whose masks are complete"
            )
        names[int(number)] = name
    if len(names) < 2 or sorted(names) != list(range(len(names))):
        raise DataError(
            f"{root / DESCRIPTION}: labels {labels!r}; expected 0 for the background and classes "
            f"numbered from 1 without a gap"
        )
    return tuple(names[number] for number in range(1, len(names)))


def nnunet_grey_values(root: Path) -> str:
    """`site` where the description says CT, which has units; `scan` otherwise, as in nnU-Net."""
    return "site" if [name.casefold() for name in _channels(_described(root))] == ["ct"] else "scan"


def _channels(described: dict[str, Any]) -> list[str]:
    """The names of the channels: `{"0": "CT"}`, and what else people write."""
    found = described.get("channel_names") or described.get("modality") or []
    if isinstance(found, dict):
        found = list(found.values())
    return [str(name) for name in (found if isinstance(found, list) else [found])]


def _described(root: Path) -> dict[str, Any]:
    path = root / DESCRIPTION
    if not path.is_file():
        raise DataError(f"{path}: missing; copy the one that the data set comes with")
    stay_within(root, path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no object; copy the one that the data set comes with")
    if "dataset" in found:
        raise DataError(
            f"{path}: names the files of its cases one by one under 'dataset'; put them into "
            f"imagesTr and labelsTr and take the key out"
        )
    channels = _channels(found)
    if len(channels) > 1:
        raise DataError(
            f"{path}: names {len(channels)} channels {channels}; the network sees one: make a "
            f"copy of the set with one channel"
        )
    ending = found.get("file_ending", ENDINGS[0])
    if ending not in ENDINGS:
        raise DataError(
            f"{path}: file_ending is {ending!r}; convert scans and masks to NIfTI, "
            f"{' or '.join(ENDINGS)}"
        )
    return found


def _folder(root: Path, which: str, listed: Iterable[str]) -> list[Entry]:
    """The cases of `imagesTr` and `labelsTr`, or of `Ts`, and those listed."""
    masks: dict[str, list[Path]] = {name: [] for name in listed}
    for path in _nifti(root / f"labels{which}"):
        masks.setdefault(stem(path.name), []).append(path)
    scans: dict[str, list[Path]] = {}
    for path in _nifti(root / f"images{which}"):
        name, channel = stem(path.name), _CHANNEL.fullmatch(stem(path.name))
        # A name that ends in four digits has no channel if its mask ends in them as well.
        name = channel[1] if channel and name not in masks else name
        scans.setdefault(name, []).append(path)
    return [
        Entry(
            name=name,
            site="",
            split="test" if which == "Ts" else "",
            scans=tuple(scans.get(name, ())),
            masks=tuple(masks.get(name, ())),
            scan_place=f"images{which}/{name}_0000.nii.gz or images{which}/{name}.nii.gz",
            mask_place=f"labels{which}/{name}.nii.gz",
        )
        for name in sorted({*scans, *masks})
    ]


def _nifti(folder: Path) -> list[Path]:
    """The visible NIfTI files of a folder, in order; none if it is not there."""
    if not folder.is_dir():
        return []
    stay_within(folder.parent, folder)
    return [
        path
        for path in sorted(folder.iterdir())
        if stem(path.name) and not path.name.startswith(".")
    ]


def _listed(described: dict[str, Any]) -> list[str]:
    """The training cases that the description of version 1 and of the Decathlon lists."""
    rows = described.get("training")
    rows = rows if isinstance(rows, list) else []
    labels = [row.get("label") for row in rows if isinstance(row, dict)]
    return [stem(Path(label).name) for label in labels if isinstance(label, str)]
