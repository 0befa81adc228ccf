"""The synthetic scanner: orders of signals, noise, coils, grey scales, and how scanners differ."""

from __future__ import annotations

import numpy as np
import pytest

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.mr import MRScanner, Tissue, TissueCanvas, acquire, signal_of
from flap_nvflare.data.phantom_ixi import HEAD_SITES
from flap_nvflare.data.phantom_prostate import PELVIS_SITES

SPACING = (4.0, 2.0, 2.0)
SHAPE = (5, 41, 41)
SCANNERS = [site.scanner for site in (*HEAD_SITES.values(), *PELVIS_SITES.values())]
# Of these no voxel of a flat body differs from another but by noise.
FLAT = {"bias": 0.0, "noise": 1e-6, "spread": 0.0, "gain": 1000.0}


def scan(scanner: MRScanner, seed: int = 0, value: float = 1.0, **coil: object) -> np.ndarray:
    body = np.full(SHAPE, value, np.float32)
    return acquire(body, SPACING, scanner, np.random.default_rng(seed), **coil)


def test_signals_are_ordered_as_in_t1_and_t2() -> None:
    canvas = TissueCanvas((len(Tissue), 20, 20), SPACING, np.random.default_rng(0))
    for tissue in Tissue:
        canvas.tissue[tissue] = tissue
    t1, t2 = (signal_of(canvas, MRScanner(sequence)).mean(axis=(1, 2)) for sequence in ("t1", "t2"))
    assert t1[Tissue.FAT] > t1[Tissue.WHITE] > t1[Tissue.GREY] > t1[Tissue.FLUID] > t1[Tissue.BONE]
    assert t2[Tissue.FLUID] > t2[Tissue.PERIPHERAL] > t2[Tissue.CENTRAL] > t2[Tissue.MUSCLE]
    assert t1[Tissue.AIR] == t2[Tissue.AIR] == 0


def test_a_flat_body_is_flat_without_a_field_and_uneven_with_one() -> None:
    assert set(np.unique(scan(MRScanner(**FLAT)))) == {1000}
    uneven = np.log(scan(MRScanner(**{**FLAT, "bias": 0.3})).astype(float))
    assert uneven.std() == pytest.approx(0.3, rel=0.02)


def test_air_is_rician() -> None:
    """Of magnitudes of noise the mean is sigma sqrt(pi / 2) and the square's mean 2 sigma^2."""
    noisy = MRScanner(**{**FLAT, "noise": 0.1, "grain": 0.3})
    air = scan(noisy, value=0.0).astype(float)
    assert air.mean() / np.sqrt((air**2).mean()) == pytest.approx(np.sqrt(np.pi) / 2, rel=0.01)
    assert air.min() >= 0


def test_each_scan_has_its_own_grey_scale() -> None:
    means = [scan(MRScanner(**{**FLAT, "spread": 1.0}), seed).mean() for seed in range(20)]
    assert 500 <= min(means) < 700
    assert 1400 < max(means) <= 2000
    twice = scan(MRScanner(**{**FLAT, "gain": 2000.0})), scan(MRScanner(**FLAT))
    assert twice[0].mean() == 2 * twice[1].mean()


def test_coils_are_brightest_where_they_lie() -> None:
    surface = scan(MRScanner(**{**FLAT, "surface": 0.5})).astype(float)
    assert surface[2, 20, 20] == pytest.approx(0.5 * surface[2, 0, 0], rel=0.01)
    rod = scan(MRScanner(**{**FLAT, "endorectal": 8.0}), coil=(0.0, 20.0, 0.0)).astype(float)
    assert np.unravel_index(rod[2].argmax(), rod[2].shape) == (30, 20)
    assert rod[2, 30, 20] == pytest.approx(9000, rel=0.01)
    assert rod[2, 0, 20] < 3500
    assert set(np.unique(scan(MRScanner(**{**FLAT, "endorectal": 8.0})))) == {1000}


def test_scanners_may_be_alike_or_far_apart() -> None:
    for sequence in ("t1", "t2"):
        those = [one for one in SCANNERS if one.sequence == sequence]
        assert len({one.exaggerated(0) for one in those}) == 1
        assert len(set(those)) == len(those)
    for one in SCANNERS:
        same, far = one.exaggerated(1), one.exaggerated(3)
        for name in ("contrast", "bias", "centre", "surface", "noise", "grain", "blur", "gain"):
            assert getattr(same, name) == pytest.approx(getattr(one, name))
        assert abs(far.bias - 0.12) == pytest.approx(3 * abs(one.bias - 0.12))
        one.exaggerated(10)  # the most that may be asked for is still a scanner


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sequence": "flair"}, "sequence is 'flair'"),
        ({"noise": 0.0}, "noise"),
        ({"bias": -0.1}, "bias"),
        ({"gain": float("nan")}, "gain"),
        ({"surface": 1.0}, "surface"),
        ({"centre": -1.0}, "centre"),
    ],
)
def test_a_scanner_that_cannot_be_is_refused(values: dict, named: str) -> None:
    with pytest.raises(DataError, match=named):
        MRScanner(**values)
