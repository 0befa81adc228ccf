"""ViT-B at full size: two sites, one round, the official checkpoint's format, the wire's bytes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import descendants, stop
from scan_files import write_sites

from flap_nvflare.adapter.update import load_update
from flap_nvflare.sam.official import modelling

ADAPTER_BYTES = 1_846_384 * 4
# Straightforward fp32 training of all weights needs more than this for weights, gradients and
# moments alone (4 x 362 MB) beside the imports.
PEAK_MEMORY = 3.0e9


def write_checkpoint(path: Path) -> None:
    """A file as sam_vit_b_01ec64.pth: the same keys and shapes, random numbers."""
    modelling()  # enters segment_anything without torchvision
    from segment_anything import build_sam

    torch.manual_seed(0)
    torch.save(build_sam.sam_model_registry["vit_b"]().state_dict(), path)


class PeakMemory(threading.Thread):
    """The largest resident set of any process below `pid`, in bytes, while it runs."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            for pid in descendants(self.pid):
                try:
                    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
                except OSError:
                    continue
                for line in status.splitlines():
                    if line.startswith("VmHWM:"):
                        self.peak = max(self.peak, int(line.split()[1]) * 1024)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_papers_adapter_of_vit_b_travels_in_its_own_bytes(
    simulation: Callable, tmp_path: Path
) -> None:
    checkpoint, scans = tmp_path / "sam_vit_b_01ec64.pth", tmp_path / "scans"
    write_checkpoint(checkpoint)
    write_sites(scans, ("A", "B"))
    small = simulation(
        "full_size",
        changes={"rounds": 1, "batch_size": 2, "cross_site": "global", "augment": False},
    )
    process = small.start(FLAP_SAM_CHECKPOINT=str(checkpoint), FLAP_DATA_ROOT=str(scans))
    memory = PeakMemory(process.pid)
    memory.start()
    started = time.monotonic()
    try:
        process.wait(800)
    finally:
        memory.done.set()
        stop(process)
    (run,) = (small.home / "runs" / "fed_kits").iterdir()
    line = json.loads((run / "rounds.jsonl").read_text().splitlines()[0])
    tensors, spec, _ = load_update(run / "adapter_last.safetensors")

    assert spec.parameters * 4 == spec.bytes == ADAPTER_BYTES
    for figures in line["sites"].values():
        for direction in ("bytes_up", "bytes_down"):
            assert abs(figures[direction] / ADAPTER_BYTES - 1) < 0.05
    heads = ("output_upscaling", "output_hypernetworks_mlps", "mask_tokens")
    assert all(".lora_" in name or any(head in name for head in heads) for name in tensors)
    assert sum(".lora_" in name for name in tensors) == 2 * (2 * 12 + 2 * 7)
    assert json.loads((run / "run.json").read_text())["data"] == "sites' own"
    assert memory.peak < PEAK_MEMORY
    print(
        f"\nViT-B: {line['sites']['A']['bytes_up']:,} bytes up, "
        f"{line['sites']['A']['bytes_down']:,} down, peak of a process {memory.peak / 1e9:.2f} GB, "
        f"{time.monotonic() - started:.0f} s"
    )
