"""SAML's prostate MRI: T2 scans from six hospitals, a folder each.

    ROOT/RUNMC/Case03.nii.gz
    ROOT/RUNMC/Case03_segmentation.nii.gz      also `_Segmentation`, also plain `.nii`

The six folders may lie in one named `Processed_data_nii`, as they do when unzipped. Some masks tell
zones of the prostate apart, as labels 1 and 2, others do not: every label above 0 is the prostate.
Source: Liu et al., Shape-aware Meta-learning, 2020 (https://liuquande.github.io/SAML/).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from flap_nvflare.data.cases import stay_within, stem
from flap_nvflare.data.entries import Entry

# The published test cases.
TEST_CASES = {
    "RUNMC": (3, 8, 12, 15, 18, 26),
    "BMC": (3, 8, 12, 15, 18, 26),
    "I2CVB": (3, 8, 13, 15),
    "UCL": (1, 32, 34),
    "BIDMC": (0, 4, 9),
    "HK": (38, 41, 46),
}
CLASS_NAMES = ("prostate",)
UNZIPPED = "Processed_data_nii"
_FILE = re.compile(r"Case(\d+)(_[sS]egmentation)?")


def is_prostate(root: Path) -> bool:
    """Whether one of the six folders is there with a case in it."""
    return next(_files(root), None) is not None


def prostate_entries(root: Path) -> list[Entry]:
    """Every case of the root, named after hospital and file, such as `RUNMC-Case03`.

    Raises:
        DataError: if the folder of a hospital is a link out of the root.
    """
    found: dict[tuple[str, str], tuple[list[Path], list[Path]]] = {}
    for hospital, path, match in _files(root):
        scans, masks = found.setdefault((hospital, match[1]), ([], []))
        (masks if match[2] else scans).append(path)
    return [
        Entry(
            name=f"{hospital}-Case{number}",
            site=hospital,
            split="test" if int(number) in TEST_CASES[hospital] else "train",
            scans=tuple(scans),
            masks=tuple(masks),
            scan_place=f"{hospital}/Case{number}.nii.gz",
            mask_place=f"{hospital}/Case{number}_segmentation.nii.gz",
            binary=True,
        )
        for (hospital, number), (scans, masks) in sorted(found.items())
    ]


def _files(root: Path) -> Iterator[tuple[str, Path, re.Match[str]]]:
    """Hospital and path of each file, with the parts of its name, in order."""
    for hospital in TEST_CASES:
        for folder in (root / hospital, root / UNZIPPED / hospital):
            if not folder.is_dir():
                continue
            stay_within(root, folder)
            for path in sorted(folder.iterdir()):
                if match := _FILE.fullmatch(stem(path.name)):
                    yield hospital, path, match
