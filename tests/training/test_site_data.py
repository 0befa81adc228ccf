"""A site's cases and loader over rounds, processes and numbers of workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scan_files import write_sites

from flap_nvflare.data import prepared, volume
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.window import volume_window
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training import site_data
from flap_nvflare.training.errors import Stopped
from flap_nvflare.training.schedule import never
from flap_nvflare.training.site_data import SiteData, VolumeBatches

BY_SCAN = {"grey_values": "scan"}
FEDERATION = Federation(image_size=32, batch_size=4, validation_fraction=0.34, seed=3)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kits")
    write_sites(root, ("A", "B"))
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases whose scans were read."""
    names: list[str] = []
    load = volume.load_volume
    for module in (prepared, volume):
        monkeypatch.setattr(
            module, "load_volume", lambda case, count: names.append(case.name) or load(case, count)
        )
    return names


def drawn(data: SiteData, rounds: tuple[int, ...] = (0, 1)) -> list[bytes]:
    """Image, label, key and weight of every batch of two epochs a round."""
    seen = []
    for index in rounds:
        loader = data.loader(index)
        for batch in (batch for _ in range(2) for batch in loader):
            tensors = [batch[name] for name in ("image", "label", "weight") if name in batch]
            seen.append(
                b"".join(t.numpy().tobytes() for t in tensors) + repr(batch["key"]).encode()
            )
    return seen


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("A+B", {"channels": "neighbours", "loss_weighting": "importance"}),
        ("A", {}),
        ("A", {"batch_size": 3, "augment_views": 2}),
        ("A+B", {"batch_size": 3, "augment_views": 2}),
    ],
)
@pytest.mark.slow
def test_bytes_do_not_depend_on_workers(scans: Path, name: str, changes: dict[str, object]) -> None:
    settings = dataclasses.replace(FEDERATION, **changes)
    alone = drawn(SiteData(settings, Site(name, scans)))
    assert drawn(SiteData(settings, Site(name, scans, workers=2))) == alone
    half = len(alone) // 2
    assert alone[:half] != alone[half:]
    assert drawn(SiteData(settings, Site(name, scans)), (1,)) == alone[half:]


def test_one_loader_and_its_workers_serve_all_rounds(scans: Path) -> None:
    data = SiteData(FEDERATION, Site("A", scans, workers=1))
    processes = set()
    for index in range(3):
        loader = data.loader(index)
        batches = iter(loader)
        next(batches)  # a round that is ended early leaves nothing to the next
        processes |= {worker.pid for worker in loader._iterator._workers}
    assert len(processes) == 1
    assert drawn(data) == drawn(SiteData(FEDERATION, Site("A", scans)))


def test_the_next_process_reads_no_scan(scans: Path, tmp_path: Path, reads: list[str]) -> None:
    site = Site("A", scans, state_dir=tmp_path)

    def everything() -> tuple[list[bytes], list[bytes]]:
        data = SiteData(FEDERATION, site)
        scored = [
            batch["image"].numpy().tobytes() + repr(batch["key"]).encode()
            for split in ("validation", "test", "train")
            for batch in VolumeBatches(data, split, never)
        ]
        return drawn(data), scored

    first = everything()
    assert len(reads) == len(set(reads)) == 4
    assert everything() == first
    assert len(reads) == 4
    assert not any("case" in str(path) for path in (tmp_path / "cache").iterdir())


def test_without_a_bound_left_nothing_is_on_disk(scans: Path, tmp_path: Path) -> None:
    site = Site("A", scans, state_dir=tmp_path, cache_gb=0.0)
    assert drawn(SiteData(FEDERATION, site)) == drawn(SiteData(FEDERATION, Site("A", scans)))
    assert list(tmp_path.iterdir()) == []


def test_pooled_sites_take_what_each_has_prepared(
    scans: Path, tmp_path: Path, reads: list[str]
) -> None:
    for name in ("A", "B"):
        SiteData(FEDERATION, Site(name, scans, state_dir=tmp_path)).prepared("train")
    known = list(reads)
    SiteData(FEDERATION, Site("A+B", scans, state_dir=tmp_path)).loader(0)
    assert reads == known


def test_memory_for_volumes_is_bounded(
    scans: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one of two volumes the other is read again, to the same result."""
    whole = SiteData(FEDERATION, Site("A", scans)).prepared("train")
    reads.clear()
    monkeypatch.setattr(site_data, "_HELD_BYTES", 5 * 4 * 40 * 36 + 1)
    again = SiteData(FEDERATION, Site("A", scans)).prepared("train")
    assert [reads.count(case.name) for case in whole] == [1, 2]
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.images, other.images)


def test_a_stop_between_scans_can_be_gone_on_from(
    scans: Path, tmp_path: Path, reads: list[str]
) -> None:
    data = SiteData(FEDERATION, Site("A", scans, state_dir=tmp_path))
    asked: list[bool] = []
    with pytest.raises(Stopped, match="before case_"):
        data.loader(0, lambda: len(asked) == 3 or asked.append(True) is not None)
    assert len(reads) == 2  # both were read, one of them prepared
    assert drawn(data) == drawn(SiteData(FEDERATION, Site("A", scans)))


def test_scored_slices_have_the_keys_of_trained_ones(scans: Path) -> None:
    data = SiteData(dataclasses.replace(FEDERATION, augment=False), Site("A", scans))
    loader = data.loader(0)
    trained = {key for batch in loader for key in batch["key"]}
    scored = [key for batch in VolumeBatches(data, "train", never) for key in batch["key"]]
    assert trained <= set(scored)
    assert len(scored) == len(set(scored)) == len(loader.dataset)


def test_fixed_views_come_again_in_later_rounds(scans: Path) -> None:
    data = SiteData(dataclasses.replace(FEDERATION, augment_views=2), Site("A", scans))
    images: dict[str, bytes] = {}
    for index in range(8):
        for batch in data.loader(index):
            for key, image in zip(batch["key"], batch["image"], strict=True):
                assert images.setdefault(key, image.numpy().tobytes()) == image.numpy().tobytes()
    assert len(data.loader(0).dataset) < len(images) <= 2 * len(data.loader(0).dataset)


def test_a_bad_mask_is_named_as_ever(tmp_path: Path) -> None:
    write_sites(tmp_path, ("A",))
    data = SiteData(dataclasses.replace(FEDERATION, class_names=("kidney",)), Site("A", tmp_path))
    with pytest.raises(DataError, match=r"segmentation\.nii\.gz: unknown labels 2"):
        data.loader(0)


def test_by_scan_nothing_but_the_cases_asked_for_is_read(
    scans: Path, tmp_path: Path, reads: list[str]
) -> None:
    settings = dataclasses.replace(FEDERATION, **BY_SCAN)
    data = SiteData(settings, Site("A", scans, state_dir=tmp_path))
    (case,) = data.prepared("test")
    assert reads == [case.name]
    data.prepared("train")
    assert len(reads) == len(set(reads)) == 3
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".safetensors"}
    # What is kept serves no federation of the other way.
    (other,) = SiteData(FEDERATION, Site("A", scans, state_dir=tmp_path)).prepared("test")
    assert other.key != case.key
    assert not torch.equal(other.images, case.images)


def test_by_scan_a_site_may_mix_scanners(tmp_path: Path) -> None:
    """One of the site's scans comes with another gain; its bytes change, what is seen does not."""
    write_sites(tmp_path, ("A", "B"))
    seen: dict[str, list[torch.Tensor]] = {"site": [], "scan": []}
    for gain in (1.0, 3.7):
        path = tmp_path / "case_00001" / "imaging.nii.gz"
        image = nibabel.load(path)
        scaled = (np.asarray(image.dataobj) * gain).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(scaled, image.affine), path)
        for way, found in seen.items():
            settings = dataclasses.replace(FEDERATION, grey_values=way, validation_fraction=0.0)
            data = SiteData(settings, Site("A+B", tmp_path))
            found.append(torch.cat([case.images for case in data.prepared("train")]))
    before, after = seen["scan"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    before, after = seen["site"]
    assert (after - before).abs().max() > 0.5


def test_by_scan_a_volume_is_drawn_as_it_is_seen(scans: Path) -> None:
    data = SiteData(dataclasses.replace(FEDERATION, **BY_SCAN), Site("A", scans))
    one = volume.load_volume(data.cases.test[0], 2)
    assert data.window_of("A", one) == volume_window(one)
    by_site = SiteData(FEDERATION, Site("A", scans))
    assert by_site.window_of("A", one) == by_site.window("A") != volume_window(one)


def test_by_scan_an_empty_scan_is_named(tmp_path: Path) -> None:
    write_sites(tmp_path, ("A",))
    path = tmp_path / "case_00003" / "imaging.nii.gz"
    image = nibabel.load(path)
    voxels = np.zeros(image.shape, np.int16)
    voxels[1] = 5
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)
    data = SiteData(dataclasses.replace(FEDERATION, **BY_SCAN), Site("A", tmp_path))
    with pytest.raises(DataError, match="case_00003: all of it that is not air has one value, 5"):
        data.prepared("test")
