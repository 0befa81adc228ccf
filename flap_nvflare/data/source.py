"""A hospital's own list of its scans: one function in one file, `site_data.py`, on its own disk.

    from flap_nvflare.data.cases import ListedCase

    def site_cases(data_root, site):
        folder = data_root / "nephrology"
        return [
            ListedCase("p001", folder / "p001_ct.nii.gz", folder / "p001_mask.nii.gz", "train"),
            ListedCase("p002", folder / "p002_ct.nii.gz", folder / "p002_mask.nii.gz", "test"),
        ]

What it returns is checked here before any scan is opened. The file is found by its path at the
site, never by a module's name, so nothing that a job brings can stand in its place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flap_nvflare.data.cases import (
    CASE_NAME,
    ENDINGS,
    SPLITS,
    ListedCase,
    SiteCases,
    split_cases,
)
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.layouts import list_cases

SOURCE_FILE = "site_data.py"
FUNCTION = "site_cases"


def read_cases(
    root: Path | str,
    site: str | int,
    validation_fraction: float,
    seed: int,
    source: Path | None = None,
) -> SiteCases:
    """The cases of a site, as its own `source` lists them or in one of `layouts.LAYOUTS`.

    Args:
        root: folder with the scans.
        site: the site's name in its data.
        validation_fraction, seed: see `data.cases.split_cases`.
        source: the site's file of code; None for a layout that is recognised.

    Raises:
        DataError: if a case, a file or the source itself cannot be used.
    """
    listed = (
        list_cases(root, site) if source is None else list_source(source, Path(root), str(site))
    )
    return split_cases(listed, validation_fraction, seed)


def list_source(source: Path, root: Path, site: str) -> list[ListedCase]:
    """The checked cases of a source, in order of their names.

    Every name is plain and used once, every file is a NIfTI inside `root`, symbolic links
    followed, and of one case alone, and there are training and test cases.

    Raises:
        DataError: naming file, case, value and mend.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name the folder with the scans as data_root")
    function = _function(source)
    try:
        returned = function(root, site)
        listed = list(returned) if isinstance(returned, Iterable) else None
    except DataError:
        raise
    except Exception as error:  # whatever the hospital's code raises
        raise DataError(f"{source}: {FUNCTION} failed: {type(error).__name__}: {error}") from error
    if listed is None:
        raise DataError(f"{source}: {FUNCTION} returned {returned!r}; return a list of ListedCase")
    names: set[str] = set()
    files: dict[Path, str] = {}
    for case in listed:
        _check(source, root, case)
        if case.name in names:
            raise DataError(f"{source}: case {case.name!r} is listed twice; list it once")
        names.add(case.name)
        for file in (case.image.resolve(), case.label.resolve()):
            if file in files:
                raise DataError(
                    f"{source}: {file} is listed for {files[file]!r} and for {case.name!r}; each "
                    f"file is the scan or the mask of one case"
                )
            files[file] = case.name
    for split in SPLITS:
        if not any(case.split == split for case in listed):
            raise DataError(
                f"{source}: {FUNCTION} lists no {split} case for site {site!r}; give at least one"
            )
    return sorted(listed, key=lambda case: case.name)


def _function(source: Path) -> Any:
    """The function of the file, which is run from its path under a name that nothing imports."""
    if not source.is_file():
        raise DataError(f"{source}: no such file; 'flap-nvflare site init' writes one")
    spec = importlib.util.spec_from_file_location("flap_site_data_of_this_site", source)
    if spec is None or spec.loader is None:
        raise DataError(f"{source}: not a file of Python code; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the hospital's code raises
        raise DataError(f"{source}: cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        raise DataError(f"{source}: no function {FUNCTION}(data_root, site); write it")
    return function


def _check(source: Path, root: Path, case: object) -> None:
    if not isinstance(case, ListedCase):
        raise DataError(f"{source}: {FUNCTION} lists {case!r}; make each case a ListedCase")
    place = f"{source}: case {case.name!r}"
    if not isinstance(case.name, str) or not CASE_NAME.fullmatch(case.name):
        raise DataError(f"{place}: give a plain name of letters, digits, '_', '-' and '.'")
    if case.split not in SPLITS:
        raise DataError(f"{place}: its split is {case.split!r}; give one of {SPLITS}")
    inside = root.resolve()
    for file, what in ((case.image, "image"), (case.label, "label")):
        if not isinstance(file, Path):
            raise DataError(f"{place}: its {what} is {file!r}; give a pathlib.Path")
        if not file.name.endswith(ENDINGS):
            raise DataError(f"{place}: {file} is no NIfTI file; its name must end in {ENDINGS}")
        if not file.resolve().is_relative_to(inside):
            raise DataError(
                f"{place}: {file} leads out of {root}, to {file.resolve()}; name a data_root that "
                f"holds it"
            )
        if not file.is_file():
            raise DataError(f"{file}: missing; put the {what} of {case.name} there")
