"""A case, its split, and what holds for the cases of every layout."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flap_nvflare.data.errors import DataError

SPLITS = ("train", "test")
MANIFEST = "PHANTOM.json"  # lies beside scans that were drawn and are nobody's
CASE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
ENDINGS = (".nii.gz", ".nii")
# A site must hold this many training cases before one of them is held out.
_FEWEST_TO_SPLIT = 3


@dataclass(frozen=True)
class Case:
    """One scan and its mask.

    Attributes:
        name: name of the case, such as `case_00000`.
        image: NIfTI file with the scan, its grey values as the file has them.
        label: NIfTI file with the mask on the same grid.
        binary: whether every label above 0 is class 1, whatever the mask tells apart.
    """

    name: str
    image: Path
    label: Path
    binary: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class ListedCase(Case):
    """A case and its split.

    Attributes:
        split: `train` or `test`; which training cases are held out is chosen later.
    """

    split: str


@dataclass(frozen=True)
class SiteCases:
    """The cases of one site; no case is in two of the tuples."""

    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]


def split_cases(listed: list[ListedCase], validation_fraction: float, seed: int) -> SiteCases:
    """Training, held out and test cases, each in order of their names.

    Args:
        listed: all cases of a site.
        validation_fraction: share of the training cases held out, 0 <= share < 1. From three
            training cases on at least one is held out; with fewer none.
        seed: chooses which ones; test cases are never among them.

    Raises:
        DataError: if the share is out of range.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(
            f"validation_fraction is {validation_fraction!r}; give a number from 0 to below 1"
        )
    cases = {
        split: [
            Case(case.name, case.image, case.label, binary=case.binary)
            for case in sorted(listed, key=lambda case: case.name)
            if case.split == split
        ]
        for split in SPLITS
    }
    held_out = _held_out([case.name for case in cases["train"]], validation_fraction, seed)
    return SiteCases(
        train=tuple(case for case in cases["train"] if case.name not in held_out),
        validation=tuple(case for case in cases["train"] if case.name in held_out),
        test=tuple(cases["test"]),
    )


def is_synthetic(root: Path) -> bool:
    """Whether the scans of a folder are this package's own phantoms."""
    return (root / MANIFEST).is_file()


def stem(name: str) -> str:
    """A NIfTI file's name without its ending; empty if it has none of `ENDINGS`."""
    return next((name[: -len(end)] for end in ENDINGS if name.endswith(end)), "")


def stay_within(root: Path, file: Path) -> None:
    """Refuses a link out of the data: whoever writes there could have any file read.

    The folder itself may be a link, and links within it are none of this.

    Raises:
        DataError: if `file`, its links followed, does not lie in `root`.
    """
    if not file.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"{file}: is a link out of {root}; put the file itself there, or name a folder that "
            f"holds both as data_root"
        )


def shuffled(names: Iterable[str], seed: object) -> list[str]:
    """Names in the order of their hashes.

    A case that joins or leaves a site so moves as few of the others as possible.
    """

    def rank(name: str) -> str:
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()

    return sorted(names, key=rank)


def _held_out(names: list[str], fraction: float, seed: int) -> set[str]:
    """The validation cases: the first ones in a seeded order."""
    if fraction == 0.0 or len(names) < _FEWEST_TO_SPLIT:
        return set()
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    return set(shuffled(names, seed)[:count])
