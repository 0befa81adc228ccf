"""The merged network's rows; no time is tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scan_files import write_sites

from flap_nvflare.bench import rows, steps
from flap_nvflare.bench.merged import make_prediction, scores
from flap_nvflare.bench.rows import Setting
from flap_nvflare.settings import Federation, Site

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "ARCH", "vit_t")
    monkeypatch.setattr(steps, "RANK", 2)


def test_both_ways_give_the_same_logits() -> None:
    merged, adapter = (make_prediction(way, 48, 2, False, CPU)() for way in ("merged", "adapter"))
    torch.testing.assert_close(merged, adapter, rtol=1e-5, atol=1e-5)


def test_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # Peaks are taken in processes of their own, which would not know the small network.
    monkeypatch.setattr(rows, "_alone", lambda setting, measure, *arguments: 2.0**20)
    found = {row.name: row for row in rows.merged(Setting(CPU, False, 1, 1, (48,)))}
    assert set(found) == {"merged_inference_48_fp32", "merged_memory_48_fp32"}
    assert all(row.note and row.reference is not None for row in found.values())


def test_dice_is_the_same_on_test_cases(tmp_path: Path) -> None:
    write_sites(tmp_path, ("A",))
    federation = Federation(image_size=48, rounds=1, local_epochs=3, batch_size=4, seed=3)
    found = scores(federation, Site("A", tmp_path, device="cpu"))
    assert found.dice["merged"] == pytest.approx(found.dice["adapter"], abs=1e-3)
    assert found.dice["adapter"] > 0.1
    assert found.voxels == 4 * 40 * 36
    assert found.different < 1e-3 * found.voxels
