from __future__ import annotations

import pytest
import torch

from flap_nvflare.sam.backbone import Architecture, StockSam, initialise


@pytest.fixture(scope="session")
def tiny() -> Architecture:
    """Published layout (patch 16), small: native grid 4, windows of 3, block 1 global."""
    return Architecture(
        name="tiny",
        embed_dim=16,
        depth=2,
        heads=2,
        global_blocks=(1,),
        window=3,
        patch=16,
        dim=32,
        decoder_heads=4,
        decoder_mlp=24,
        iou_hidden=8,
        native_size=64,
    )


@pytest.fixture(scope="session")
def tiny_stock(tiny: Architecture) -> StockSam:
    """A stock model of that architecture with drawn weights."""
    model = StockSam(tiny)
    initialise(model, torch.Generator().manual_seed(7))
    return model


@pytest.fixture(scope="session")
def tiny_file(tiny_stock: StockSam, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its weights in the layout of the published files."""
    path = tmp_path_factory.mktemp("checkpoint") / "sam_tiny.pth"
    torch.save(tiny_stock.state_dict(), path)
    return str(path)
