"""What is to be predicted: NIfTI files and DICOM series, one by one or below a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flap_nvflare.data.cases import ENDINGS, stem
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.kits import IMAGE, LABEL
from flap_nvflare.data.layouts import known_masks
from flap_nvflare.data.scan import Scan, open_scan
from flap_nvflare.sam.checkpoint import file_sha256

MASK = "_mask.nii.gz"


@dataclass(frozen=True)
class Input:
    """One scan to come.

    Attributes:
        name: relative path of its results without their endings, such as `case_00000/imaging`.
        path: the NIfTI file, or the folder of the series.
        files: the NIfTI file, or all DICOM files of the folder.
        series: of a DICOM series the UID that was asked for; empty for the only one.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    series: str = ""

    def open(self) -> Scan:
        """Opens the scan.

        Raises:
            DataError: if it cannot be used.
        """
        if self.path.is_dir():
            from flap_nvflare.prediction.dicom import open_series

            return open_series(self.files, self.series)
        return open_scan(self.path)

    def sha256(self) -> str:
        """Of all that the scan is made of."""
        digest = hashlib.sha256(self.series.encode())
        for path in self.files:
            digest.update(file_sha256(path).encode())
        return digest.hexdigest()


def find_inputs(path: Path, series: str = "") -> list[Input]:
    """The scans that `path` names, in order of their names.

    Of a folder all NIfTI files in it and below; without any, each folder of DICOM files in it and
    below. Left out are hidden files, masks that `predict` wrote, and in a layout of `data.layouts`
    the masks.

    Args:
        path: a NIfTI file, or a folder.
        series: UID of a DICOM series, for folders that hold several.

    Raises:
        DataError: if there is nothing to predict, two scans would share one result, or a series is
            named where NIfTI files are.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name a NIfTI file or a folder")
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise DataError(
                f"{path}: is no NIfTI file by its name, which must end in {' or '.join(ENDINGS)}; "
                "of a DICOM series name the folder"
            )
        _refuse_series(path, series)
        return [Input(stem(path.name), path, (path,))]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)]
    masks = known_masks(path)
    if scans := [file for file in files if _is_scan(file) and file not in masks]:
        _refuse_series(scans[0], series)
        inputs = [Input(stem(str(file.relative_to(path))), file, (file,)) for file in scans]
    else:
        inputs = _series(path, files, series)
    if not inputs:
        raise DataError(f"{path}: no NIfTI file ({', '.join(ENDINGS)}) and no DICOM file in it")
    seen: dict[str, Path] = {}
    for one in inputs:
        if one.name in seen:
            raise DataError(
                f"{one.path}: would share its mask with {seen[one.name]}; rename one of them"
            )
        seen[one.name] = one.path
    return inputs


def _refuse_series(scan: Path, series: str) -> None:
    if series:
        raise DataError(
            f"--series {series}: {scan} is NIfTI, and NIfTI files are taken before DICOM; leave "
            "--series out, or name the folder of the DICOM series"
        )


def _series(root: Path, files: Sequence[Path], series: str) -> list[Input]:
    from flap_nvflare.prediction.dicom import is_dicom

    folders: dict[Path, list[Path]] = {}
    for file in files:
        if is_dicom(file):
            folders.setdefault(file.parent, []).append(file)
    if not folders:
        return []
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{root}: DICOM is read by pydicom; pip install 'flap_nvflare[dicom]'"
        ) from error
    return [
        Input(
            root.resolve().name if folder == root else str(folder.relative_to(root)),
            folder,
            tuple(found),
            series,
        )
        for folder, found in folders.items()
    ]


def _is_scan(file: Path) -> bool:
    if not file.name.endswith(ENDINGS) or file.name.endswith(MASK):
        return False
    return file.name != LABEL or not (file.parent / IMAGE).exists()


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
