"""Training steps and predictions of ViT-B in several ways, against the straightforward one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from flap_nvflare.bench.reference import build_ours, straightforward
from flap_nvflare.sam.backbone import architecture, build_image_encoder
from flap_nvflare.sam.packed import Packed, available, product
from flap_nvflare.sam.runtime import Runtime, place
from flap_nvflare.sam.segmenter import build_segmenter

ARCH, CLASSES, RANK = "vit_b", 2, 32
LAST_BLOCKS = 4
WAYS = ("fp32", "bf16", "bf16, checkpointing", "straightforward", "straightforward, full")


@dataclass
class Step:
    """A training step: forward, loss, backward, AdamW; the call returns its loss."""

    network: nn.Module
    runtime: Runtime
    inputs: Callable[[], Tensor]
    label: Tensor
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda network, x: network(x)

    def __post_init__(self) -> None:
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.loss = _loss()

    def __call__(self) -> float:
        with self.runtime.autocast():
            logits = self.forward(self.network, self.inputs())
        loss = self.loss(logits.float(), self.label)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


@cache
def _loss() -> Any:
    from monai.losses import DiceCELoss

    return DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, batch=True)


def images(size: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, S, S) and labels (N, 1, S, S)."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 3, size, size, generator=generator)
    label = torch.randint(0, CLASSES + 1, (batch, 1, size, size), generator=generator)
    return image.to(device), label.to(device)


def make_step(way: str, size: int, batch: int, device: torch.device) -> Step:
    """One of `WAYS` with method `flap`, or `full` where it says so."""
    if way not in WAYS:
        raise ValueError(f"way {way!r} is not known; expected one of {WAYS}")
    image, label = images(size, batch, device)
    method = "full" if way.endswith("full") else "flap"
    network = build_ours(ARCH, size, CLASSES, method, RANK)
    runtime = Runtime(
        device,
        bf16=way.startswith("bf16"),
        checkpointing="checkpointing" in way,
        packed=available(device, way.startswith("bf16")) and not way.startswith("straight"),
        channels_last=device.type == "cuda" and not way.startswith("straight"),
    )
    if way.startswith("straight"):
        other = straightforward(network, ARCH, method, RANK).to(device)
        return Step(other, runtime, lambda: image, label)
    return Step(place(network, runtime), runtime, lambda: image, label)


def make_cached_step(size: int, batch: int, bf16: bool, device: torch.device) -> Step:
    """Adapters in the last four blocks; the tokens before them are read from files each step."""
    from flap_nvflare.data.store import Store
    from flap_nvflare.training.prefix_cache import PrefixCache

    image, label = images(size, batch, device)
    network = build_segmenter(
        ARCH, size, CLASSES, "flap", RANK, 0, base="random", lora_blocks=LAST_BLOCKS
    )
    runtime = Runtime(device, bf16=bf16, packed=available(device, bf16))
    place(network, runtime)
    folder = TemporaryDirectory()
    cache = PrefixCache(network, runtime, Store(Path(folder.name), 10**9))
    keys = [f"slice {index}" for index in range(batch)]
    step = Step(network, runtime, lambda: cache.tokens(image, keys).to(device), label)
    step.folder = folder  # type: ignore[attr-defined]  # lives as long as the step
    return step


class Prediction:
    """Class logits of a batch, without gradients."""

    def __init__(self, network: nn.Module, runtime: Runtime, image: Tensor) -> None:
        self.network, self.runtime, self.image = network.eval(), runtime, image

    def __call__(self) -> Tensor:
        with torch.inference_mode(), self.runtime.autocast():
            result: Tensor = self.network(self.image)
        return result


def make_predictions(
    size: int, batch: int, bf16: bool, device: torch.device
) -> tuple[Prediction, Prediction]:
    """Our whole network, and segment_anything's encoder alone in float32."""
    ours = build_ours(ARCH, size, CLASSES, "flap", RANK)
    encoder = build_image_encoder(architecture(ARCH), size).to(device)
    image, _ = images(size, batch, device)
    runtime = Runtime(device, bf16=bf16, packed=available(device, bf16))
    place(ours, runtime)
    return Prediction(ours, runtime, image), Prediction(encoder, Runtime(device), image)


def least_operations(size: int, batch: int) -> int:
    """Floating-point operations that no implementation of our step can leave out.

    Forward pass and gradients of the activations, two operations a multiplication: encoder and
    attention counted by hand without padded tokens, adapters and their gradients left out;
    neck, decoder and up-scaler as torch counts them, with the gradients of what trains.
    """
    sizes = architecture(ARCH)
    tokens, width = sizes.grid(size) ** 2, sizes.embed_dim
    forward = 2 * tokens * 3 * sizes.patch**2 * width  # patches; nothing before them trains
    forward -= 2 * tokens * 3 * width**2  # and so the first qkv's input needs no gradient
    for block in range(sizes.depth):
        whole = block in sizes.global_blocks
        keys = tokens if whole else min(tokens, sizes.window**2)
        forward += 2 * (2 * tokens * 12 * width**2)  # qkv, proj, MLP, and their inputs' gradients
        forward += 3 * (2 * 2 * tokens * keys * width)  # scores and sums; twice that backwards
    return batch * forward + _decoder_operations(size, batch)


def _decoder_operations(size: int, batch: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    network = build_ours(ARCH, size, CLASSES, "flap", RANK)
    grid, width = network.arch.grid(size), network.arch.embed_dim
    tokens = torch.zeros(batch, grid, grid, width, requires_grad=True)
    network.image_encoder.blocks = nn.ModuleList()
    with FlopCounterMode(display=False) as counter:
        network(tokens).sum().backward()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Product:
    """x W^T, by packed weights where torch has them: the rate to hold a step against."""

    x: Tensor
    weight: Tensor
    layout: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.layout is not None:
            return product(self.x, self.layout, None)
        return nn.functional.linear(self.x, self.weight)

    @property
    def operations(self) -> int:
        """Two for every product of numbers."""
        return 2 * self.x.shape[0] * self.weight.numel()


def make_product(tokens: int, bf16: bool, device: torch.device) -> Product:
    """The product that most of a step consists of: the first layer of ViT-B's MLP."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(tokens, 768, device=device, dtype=dtype)
    weight = torch.randn(3072, 768, device=device, dtype=dtype)
    packed = available(device, bf16)
    return Product(x, weight, Packed().of(weight, tokens)[0] if packed else None)
