"""Tokens of frozen blocks are made once for each slice, and change nothing that is learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.work import SiteWork

LAST_BLOCK = {"lora_blocks": 1, "augment": False}


def work(federation: Federation, site: Site, folder: Path | None = None, **more: Any) -> SiteWork:
    settings = dataclasses.replace(federation, **{**LAST_BLOCK, **more})
    return build_work(settings, dataclasses.replace(site, state_dir=folder))


def counts(made: SiteWork) -> tuple[int, int]:
    assert made.prefix is not None
    return made.prefix.made, made.prefix.found


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_slice_is_made_once_for_all_rounds(
    federation: Federation, site: Site, tmp_path: Path, on_disk: bool
) -> None:
    first = work(federation, site, tmp_path if on_disk else None)
    for index in range(2):
        first.train(index)
    drawn = sum(counts(first))
    made = counts(first)[0]
    assert made <= 8 < drawn
    first.evaluate("validation")
    first.evaluate("validation")
    assert counts(first)[0] > made
    assert counts(first)[1] > 0


def test_another_process_finds_them_and_learns_the_same(
    federation: Federation, site: Site, tmp_path: Path
) -> None:
    results = []
    for folder in (tmp_path, tmp_path, None):
        one = work(federation, site, folder)
        one.train(0)
        results.append((counts(one)[0], one.adapter()))
    assert results[0][0] > 0
    assert results[1][0] == 0
    for _, adapter in results[1:]:
        assert all(torch.equal(adapter[name], results[0][1][name]) for name in adapter)


def test_training_on_tokens_is_training_on_images(federation: Federation, site: Site) -> None:
    cached, plain = work(federation, site), work(federation, site)
    plain.prefix = None
    assert cached.train(0).loss == pytest.approx(plain.train(0).loss, rel=1e-3)
    ours, theirs = cached.adapter(), plain.adapter()
    moved = work(federation, site).adapter()
    apart = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
    way = sum(float((ours[n] - moved[n]).square().sum()) for n in ours)
    assert 0 < apart < 0.05 * way  # tokens are rounded to bfloat16


def test_fixed_views_are_kept_and_fresh_ones_are_not(federation: Federation, site: Site) -> None:
    fresh = work(federation, site, augment=True)
    fresh.train(0)
    assert counts(fresh) == (0, 0)
    fixed = work(federation, site, augment=True, augment_views=2, local_epochs=6)
    fixed.train(0)
    made, found = counts(fixed)
    assert 0 < made <= 16
    assert found > 0


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({"lora_blocks": 0}, 0),
        ({"lora_blocks": 1}, 3),
        ({"lora_blocks": 4}, 0),
        ({"method": "partial_decoder"}, 4),
        ({"method": "full"}, 0),
    ],
)
def test_what_is_frozen_follows_the_method(
    federation: Federation, site: Site, changes: dict[str, Any], frozen: int
) -> None:
    one = work(federation, site, **changes)
    assert one.network.frozen_blocks == frozen
    one.train(0)
    assert (counts(one)[0] > 0) is (frozen > 0)


def test_other_weights_share_nothing(federation: Federation, site: Site, tmp_path: Path) -> None:
    work(federation, site, tmp_path).train(0)
    other = work(federation, site, tmp_path, seed=4)  # the base is drawn from the seed
    other.train(0)
    assert counts(other)[0] > 0


def test_a_damaged_file_is_made_again(federation: Federation, site: Site, tmp_path: Path) -> None:
    first = work(federation, site, tmp_path)
    first.train(0)
    files = list(tmp_path.rglob("*.tokens"))
    assert len(files) == counts(first)[0]
    assert not any("case" in path.name for path in files)
    for path in files:
        data = bytearray(path.read_bytes())
        data[-9] ^= 1  # of the right length, so only a checksum can tell
        path.write_bytes(data)
    again = work(federation, site, tmp_path)
    again.train(0)
    assert counts(again)[0] == len(files)
    assert all(torch.equal(t, first.adapter()[name]) for name, t in again.adapter().items())
