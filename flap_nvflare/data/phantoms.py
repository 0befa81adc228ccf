"""What synthetic scans to draw: the knobs of all kinds, and one function that writes them.

A kind is a module with a function `phantom_folder(phantoms)`, named in `KINDS`; a modality of the
abdomen is one with the contrast `PHASE` and a function `scan(canvas, scanner)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from flap_nvflare.data.errors import DataError

if TYPE_CHECKING:
    from flap_nvflare.data.phantom_files import Drawn, PhantomCase, PhantomFolder

KINDS = {"kits": "phantom", "ixi": "phantom_ixi", "prostate": "phantom_prostate"}
MODALITIES = {"ct": "ct", "mr": "abdomen_mr", "ultrasound": "ultrasound", "xray": "xray"}
MOST_SITES = 200
# Training cases are numbered from 0, test cases from here, so that more of one moves no other.
FIRST_TEST = 1000

# Readers of neighbouring sites draw wide, tight, and true.
_SHARES = (1.0, -1.0, 0.0)


@dataclass(frozen=True)
class Phantoms:
    """The knobs of synthetic scans.

    Attributes:
        kind: what is drawn and in which layout, one of `KINDS`.
        seed: of everything random; same seed, same bytes.
        sites: number of sites S001, S002 and so on with scanners drawn between the described
            ones; 0 means the kind's own sites.
        train, test: cases of each site; 0 means as described. A larger `train` only adds cases:
            the others, and all test cases, stay as they are.
        difference: how far the scanners are from each other: 0 all alike, 1 as described.
        labels: mm by which the outlines of the first site are drawn too wide and those of the
            second too tight; the third draws them true, and so on in turn.
        modality: what the bodies of the kind `kits` are pictured with, one of `MODALITIES`; their
            masks are the same.

    Raises:
        DataError: if a value is out of range.
    """

    kind: str = "kits"
    seed: int = 0
    sites: int = 0
    train: int = 0
    test: int = 0
    difference: float = 1.0
    labels: float = 0.0
    modality: str = "ct"

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, KINDS)
        _check_choice("modality", self.modality, MODALITIES)
        _check_whole("seed", self.seed, None)
        _check_whole("sites", self.sites, MOST_SITES)
        _check_whole("train", self.train, FIRST_TEST)
        _check_whole("test", self.test, FIRST_TEST)
        for name, value in (("difference", self.difference), ("labels", self.labels)):
            if not 0.0 <= value <= 10.0:
                raise DataError(f"{name} is {value!r}; give a number from 0 to 10")

    @property
    def counted(self) -> bool:
        """Whether cases are numbered so that another number of them moves none."""
        return bool(self.sites or self.train or self.test)

    def values(self) -> dict[str, object]:
        """For the manifest: the seed, and what else is not as it is by default."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"seed": known.pop("seed")} | {
            name: value for name, value in known.items() if value != getattr(Phantoms, name)
        }


def refuse_kits_knobs(phantoms: Phantoms, sites: Iterable[str]) -> None:
    """Refuses what the kind `kits` alone can be asked for.

    Args:
        phantoms: the knobs of another kind.
        sites: its hospitals, which its layout names.

    Raises:
        DataError: on another number of sites, or another modality than the kind's own.
    """
    for name, value in (("sites", phantoms.sites), ("modality", phantoms.modality)):
        if value != getattr(Phantoms, name):
            raise DataError(
                f"{name} is {value!r}, a knob of kind kits; {phantoms.kind} has the sites "
                f"{', '.join(sites)} and its own scanners"
            )


def phantom_sites(phantoms: Phantoms) -> tuple[str, ...]:
    """Names of the sites, in order."""
    return _folder(phantoms).sites


def write_phantoms(
    root: Path | str,
    phantoms: Phantoms,
    only: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the cases of some sites that are not there yet, and the tables of all sites.

    Args:
        root: folder, made if missing; empty, or of an earlier call with the same knobs.
        phantoms: the knobs.
        only: names of the sites to write; None means all.
        progress: called with (cases done, cases in all) after each case.

    Returns:
        The folder.

    Raises:
        DataError: if the folder holds anything else, or phantoms of other knobs, or if a site is
            unknown, or if a knob is none of this kind's.
    """
    from flap_nvflare.data.phantom_files import write_folder

    content = _folder(phantoms)
    if phantoms.labels:
        content = _with_outlines_moved(content, phantoms.labels)
    write_folder(Path(root), content, phantoms.values(), only, progress)
    return Path(root)


def _folder(phantoms: Phantoms) -> PhantomFolder:
    module = import_module(f"flap_nvflare.data.{KINDS[phantoms.kind]}")
    folder: PhantomFolder = module.phantom_folder(phantoms)
    return folder


def _with_outlines_moved(content: PhantomFolder, mm: float) -> PhantomFolder:
    def drawn_by_the_readers_of(case: PhantomCase) -> PhantomCase:
        share = _SHARES[content.sites.index(case.site) % len(_SHARES)]
        return replace(case, draw=lambda: _moved(case.draw(), share * mm))

    return replace(content, cases=tuple(map(drawn_by_the_readers_of, content.cases)))


def _moved(drawn: Drawn, mm: float) -> Drawn:
    import numpy as np

    from flap_nvflare.data.outlines import moved

    image, label, affine = drawn
    depth, height, width = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
    return image, moved(label, (depth, height, width), mm), affine


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise DataError(f"{name} is {value!r}; give one of {', '.join(known)}")


def _check_whole(name: str, value: int, most: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0 or (most is not None and value > most):
        upper = "" if most is None else f" to {most}"
        raise DataError(f"{name} is {value!r}; give a whole number from 0{upper}")
