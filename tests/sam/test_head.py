from __future__ import annotations

import pytest
import torch

from flap_nvflare.sam.backbone import ARCHITECTURES, Architecture
from flap_nvflare.sam.head import FRESH, build_class_decoder, build_upscaler


@pytest.mark.parametrize(("name", "widths"), [("vit_b", [64, 32, 16, 8]), ("vit_t", [32, 16, 8])])
def test_upscaler_reaches_full_resolution(name: str, widths: list[int]) -> None:
    arch = ARCHITECTURES[name]
    with torch.device("meta"):
        upscaler = build_upscaler(arch)
        out = upscaler(torch.empty(1, arch.dim, 3, 3))
    convolutions = [m for m in upscaler if isinstance(m, torch.nn.ConvTranspose2d)]
    assert [c.out_channels for c in convolutions] == widths
    assert out.shape == (1, widths[-1], 3 * arch.patch, 3 * arch.patch)


def test_head_has_the_papers_sizes() -> None:
    with torch.device("meta"):
        decoder = build_class_decoder(ARCHITECTURES["vit_b"], 2)

    def size(name: str) -> int:
        return sum(p.numel() for p in decoder.get_submodule(name).parameters())

    assert size("output_upscaling") == 76_632
    assert size("output_hypernetworks_mlps") == 3 * 133_640
    assert size("mask_tokens") == 3 * 256


def test_what_starts_fresh(tiny: Architecture) -> None:
    decoder = build_class_decoder(tiny, 1)
    kept = {n for n, _ in decoder.named_parameters() if not FRESH.match(n)}
    upscaling = {n for n in kept if n.startswith("output_upscaling")}
    assert upscaling == {f"output_upscaling.{k}.{w}" for k in "013" for w in ("weight", "bias")}
    assert "iou_token.weight" in kept
    assert not {n for n in kept if "hypernetworks" in n or "mask_tokens" in n}


def test_a_class_is_needed(tiny: Architecture) -> None:
    with pytest.raises(ValueError, match="classes"):
        build_class_decoder(tiny, 0)
