"""ViT-B at full size: from a file in SAM's format and an adapter to a bundle, with its numbers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from flap_nvflare.adapter.update import UpdateSpec, save_update
from flap_nvflare.bundle.builders import make_network
from flap_nvflare.bundle.trained import load_trained
from flap_nvflare.cli import main
from flap_nvflare.sam.backbone import StockSam, initialise
from flap_nvflare.sam.merged import plain_segmenter
from flap_nvflare.sam.tuning import trainable
from flap_nvflare.settings import Federation, Site


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_vit_b_is_merged_and_traced(tmp_path: Path) -> None:
    checkpoint = tmp_path / "sam_vit_b_01ec64.pth"
    stock = StockSam("vit_b")
    initialise(stock, torch.Generator().manual_seed(0))
    torch.save(stock.state_dict(), checkpoint)
    federation = Federation.of_profile("paper")
    network = make_network(federation, Site("A", tmp_path, checkpoint=str(checkpoint)))
    draw = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor.detach() + 0.01 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in trainable(network, "flap").items()
    }
    spec = UpdateSpec.of(tensors, "flap", federation.rank, network.base_sha256)
    file = tmp_path / "adapter.safetensors"
    save_update(file, tensors, spec, {"federation": json.dumps(federation.to_dict())})
    del network, stock

    out, started = tmp_path / "bundle", time.perf_counter()
    words = ["--adapter", str(file), "--checkpoint", str(checkpoint)]
    assert main(["export", "bundle", str(out), *words]) == 0
    seconds = time.perf_counter() - started
    plain = plain_segmenter("vit_b", 224, 2)
    plain.load_state_dict(torch.load(out / "models" / "model.pt", weights_only=True))
    image = torch.randn(1, 3, 224, 224, generator=draw)
    with torch.no_grad():
        merged, unmerged = plain(image), load_trained(file, checkpoint).network(image)
        traced = torch.jit.trace(plain, image, check_trace=False)(image)
    size = (out / "models" / "model.pt").stat().st_size
    assert (merged - unmerged).abs().max() < 1e-5
    assert (traced - merged).abs().max() < 1e-5
    assert size == pytest.approx(4 * sum(p.numel() for p in plain.state_dict().values()), rel=0.01)
    print(
        f"\nViT-B: bundle in {seconds:.0f} s, model.pt {size:,} bytes; logits to "
        f"{merged.abs().max():.3f}, merged differs by {(merged - unmerged).abs().max():.1e}, "
        f"traced by {(traced - merged).abs().max():.1e}"
    )
