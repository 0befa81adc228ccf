"""The synthetic abdomen in other modalities: one body, other pictures, each with its own look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flap_nvflare.data import abdomen_mr, ultrasound, xray
from flap_nvflare.data.canvas import Canvas
from flap_nvflare.data.kits import read_kits
from flap_nvflare.data.phantom import phantom_case
from flap_nvflare.data.phantoms import MODALITIES, Phantoms, write_phantoms
from flap_nvflare.data.scanners import PHANTOM_SITES
from flap_nvflare.data.volume import load_volume

SCANNER = PHANTOM_SITES["A"]
OTHERS = [modality for modality in MODALITIES if modality != "ct"]


@pytest.fixture
def slab() -> Canvas:
    """Muscle of 240 x 240 mm, its back at row 88 of 96, in nine slices of 10 mm."""
    canvas = Canvas((9, 96, 96), (10.0, 3.0, 3.0), np.random.default_rng(0))
    canvas.hu[:, 8:88, 8:88] = 50
    return canvas


@pytest.fixture(scope="module")
def ct() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return phantom_case("D", 0, 0)


@pytest.mark.parametrize("modality", OTHERS)
def test_all_modalities_show_one_body_on_one_grid(
    modality: str, ct: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    image, mask, affine = phantom_case("D", 0, 0, modality=modality)
    assert image.dtype == np.int16
    assert image.shape == mask.shape
    assert np.array_equal(mask, ct[1])
    assert np.array_equal(affine, ct[2])
    body = ct[0] > -300
    assert image[body].std() > 20
    assert np.corrcoef(image[body], ct[0][body])[0, 1] < 0.9
    again = phantom_case("D", 0, 0, modality=modality)
    assert np.array_equal(again[0], image)


@pytest.mark.parametrize("module", [abdomen_mr, ultrasound, xray])
@pytest.mark.parametrize("difference", [0.0, 1.0, 10.0])
def test_the_furthest_scanner_still_shows_something(
    module: object, difference: float, slab: Canvas
) -> None:
    slab.hu[:, 30:60, 30:60] = 118
    far = PHANTOM_SITES["E"].exaggerated(difference)
    image = module.scan(slab, far)  # type: ignore[attr-defined]
    assert image.min() >= 0
    assert image.std() > 3


def test_a_kidney_in_mr_has_a_cortex_between_fat_and_a_dark_tumour(slab: Canvas) -> None:
    for rows, hu in ((20, -104), (40, 118), (60, 92), (75, 400)):
        slab.hu[:, rows : rows + 10, 20:76] = hu
    image = abdomen_mr.scan(slab, SCANNER)
    fat, cortex, medulla, bone = (np.median(image[:, r + 3 : r + 7]) for r in (20, 40, 60, 75))
    assert fat > 1.3 * cortex > 1.3 * 1.15 * medulla
    assert bone < 0.5 * medulla
    assert np.median(image[:, :5]) < 0.5 * medulla


def test_ultrasound_sees_a_fan_from_the_back_with_shadows_behind_bone_and_gas(
    slab: Canvas,
) -> None:
    left = round(47.5 - 56 / 3)  # the column below the first probe
    slab.hu[0:3, 70:74, left - 4 : left + 5] = 420
    slab.hu[3:6, 70:74, left - 4 : left + 5] = -880
    slab.hu[6:9, 70:74, left - 4 : left + 5] = 10
    image = ultrasound.scan(slab, SCANNER).astype(float)
    behind, open_view = image[:, 50:66, left - 1 : left + 2], image[:, 50:66, 80 - left : 83 - left]
    for slices in (slice(0, 3), slice(3, 6)):
        assert behind[slices].mean() < 0.1 * open_view[slices].mean()
        column = image[slices, :, left - 2 : left + 3].mean((0, 2))
        assert column[72:76].max() > column[78:84].max()  # the edge itself is bright
    assert behind[6:].mean() > 1.05 * open_view[6:].mean()  # fluid takes nothing
    assert image[6:, 71:73, left].max() < 0.5 * open_view.mean()
    assert not image[:, 89:].any()
    assert not image[:, :20].any()


def test_speckle_multiplies_the_echo(slab: Canvas) -> None:
    """Of fully developed speckle: mean by deviation of the amplitude is 1.91."""
    one = np.full((64, 128), 50.0)
    decibels = ultrasound._echoes(one, 0.0, 1.0, 1.0, np.random.default_rng(0))[:, 8:40]
    amplitude = 10 ** (decibels / 20)
    assert 1.5 < amplitude.mean() / amplitude.std() < 2.3


def test_a_projection_lays_neighbouring_slices_over_each_other(slab: Canvas) -> None:
    slab.hu[4, 40:50, 40:50] = 1000
    film = xray.scan(slab, SCANNER).astype(float)
    dense, beside = film[:, 43:47, 43:47].mean((1, 2)), film[:, 43:47, 60:64].mean((1, 2))
    # A slab of 70 mm: seven slices show the dense block alike, the outer ones do not.
    assert (dense[1:8] - beside[1:8] > 5).all()
    assert np.ptp(dense[1:8] - beside[1:8]) < 0.3 * np.mean(dense[1:8] - beside[1:8])
    assert abs(dense[[0, 8]] - beside[[0, 8]]).max() < 0.3 * (dense[4] - beside[4])
    assert film[:, 20:60, 20:30].mean() > 1.5 * film[:, :4].mean()


def test_a_folder_of_another_modality_reads_as_kits(tmp_path: Path) -> None:
    knobs = Phantoms(modality="mr", train=1, test=1)
    case = read_kits(write_phantoms(tmp_path, knobs, only="D"), "D", 0.0, 0).train[0]
    expected = phantom_case("D", 0, 0, modality="mr")[0]
    assert np.array_equal(load_volume(case, 2).image, expected)
