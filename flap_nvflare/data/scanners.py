"""The CT scanners of the synthetic hospitals: six described ones, and any number between them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from flap_nvflare.data.errors import DataError


@dataclass(frozen=True)
class PhantomSite:
    """One synthetic hospital.

    Attributes:
        train, test: number of cases.
        phases: contrast phases of its scans, drawn evenly (see `anatomy.PHASES`). A small site
            keeps to one protocol: its few training cases must show what its test cases do.
        contrast: share of the phase's contrast that arrives, 0 to 1.
        noise: deviation of the noise in HU.
        grain: correlation of the noise in pixels.
        shift, scale: HU = scale * HU + shift, a scanner out of calibration.
        in_plane, slice_spacing: ranges in mm; the field of view is set close around the body.
        tumours: share of the cases with a tumour; the first training and the first test case
            always have one.
    """

    train: int
    test: int
    phases: tuple[str, ...]
    contrast: float
    noise: float
    grain: float
    shift: float
    scale: float
    in_plane: tuple[float, float]
    slice_spacing: tuple[float, float]
    tumours: float

    def exaggerated(self, difference: float) -> PhantomSite:
        """The scanner with its distance to a typical one times `difference`; 0 makes all alike."""

        def linear(value: float, typical: float) -> float:
            return typical + difference * (value - typical)

        return replace(
            self,
            contrast=max(linear(self.contrast, 1.0), 0.1),
            noise=NOISE * (self.noise / NOISE) ** difference,
            grain=GRAIN * (self.grain / GRAIN) ** difference,
            shift=linear(self.shift, 0.0),
            scale=max(linear(self.scale, 1.0), 0.1),
        )


# Of a typical scanner: the geometric means over the sites below.
NOISE, GRAIN = 13.8, 0.63

PHANTOM_SITES = {
    "A": PhantomSite(4, 2, ("venous",), 0.9, 12, 0.6, 0, 1.0, (2.35, 2.5), (4.5, 5.0), 0.9),
    "B": PhantomSite(5, 2, ("arterial",), 1.0, 17, 0.4, 12, 1.06, (2.35, 2.6), (4.0, 5.0), 0.85),
    "C": PhantomSite(4, 2, ("arterial",), 1.15, 9, 0.9, -8, 1.1, (2.3, 2.45), (4.0, 4.5), 1.0),
    "D": PhantomSite(3, 2, ("venous",), 0.8, 14, 0.8, 5, 0.95, (2.4, 2.6), (5.0, 6.0), 0.8),
    "E": PhantomSite(5, 2, ("venous",), 0.75, 19, 0.5, 25, 0.92, (2.45, 2.6), (4.5, 6.0), 0.8),
    "F": PhantomSite(
        8, 3, ("arterial", "venous", "late"), 0.95, 14, 0.7, -15, 1.0, (2.3, 2.6), (3.5, 5.5), 0.85
    ),
}

# Training and test cases of a site that nobody described.
_TRAIN, _TEST = 4, 2
# Stands for the number of a case where a scanner is drawn: no case has it.
_SCANNER = 1_000_000
_NUMBERED = re.compile(r"S([0-9]{3})")


def numbered_sites(count: int) -> tuple[str, ...]:
    """`S001`, `S002` and so on."""
    return tuple(f"S{number:03d}" for number in range(1, count + 1))


def site_number(site: str) -> int:
    """The number that stands for a site in the seed of its cases.

    Raises:
        DataError: if there is no such site.
    """
    if site in PHANTOM_SITES:
        return ord(site)
    numbered = _NUMBERED.fullmatch(site)
    if not numbered:
        raise DataError(
            f"no synthetic site {site!r}; expected one of {list(PHANTOM_SITES)}, or S001 and so on"
        )
    return 1000 + int(numbered[1])


def scanner_of(site: str, version: int, seed: int) -> PhantomSite:
    """The scanner of a described site, or of a numbered one: drawn between two described ones.

    Args:
        site: such as `A` or `S001`.
        version: of the phantoms.
        seed: of the phantoms; which other sites there are makes no difference.

    Raises:
        DataError: if there is no such site.
    """
    number = site_number(site)
    if site in PHANTOM_SITES:
        return PHANTOM_SITES[site]
    rng = np.random.default_rng([version, seed, number, _SCANNER])
    one, other = (PHANTOM_SITES[name] for name in rng.choice(list(PHANTOM_SITES), 2, replace=False))
    share = float(rng.uniform())

    def between(name: str, place: int | None = None) -> float:
        low, high = getattr(one, name), getattr(other, name)
        if place is not None:
            low, high = low[place], high[place]
        return float(low + share * (high - low))

    return PhantomSite(
        train=_TRAIN,
        test=_TEST,
        phases=one.phases if share < 0.5 else other.phases,
        in_plane=(between("in_plane", 0), between("in_plane", 1)),
        slice_spacing=(between("slice_spacing", 0), between("slice_spacing", 1)),
        **{
            name: between(name)
            for name in ("contrast", "noise", "grain", "shift", "scale", "tumours")
        },
    )
