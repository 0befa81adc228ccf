"""How the network runs on the hardware at hand: precision, memory layout, compiler, checkpoints.

None of these changes what is learned beyond rounding, so a site chooses by itself; `auto` decides
by device and memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from flap_nvflare.sam.encoder import ImageEncoder
from flap_nvflare.sam.memory import activation_bytes
from flap_nvflare.sam.network import Network
from flap_nvflare.sam.packed import available, pack
from flap_nvflare.sam.segmenter import Segmenter
from flap_nvflare.settings import SWITCHES

_LOWERED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Runtime:
    """What was chosen.

    Attributes:
        device: where the network lives.
        bf16: run under autocast to bfloat16, with frozen weights kept in it.
        checkpointing: make a block's activations again in the backward pass.
        channels_last: images and convolutions in the channels-last layout.
        packed: frozen weights laid out for the processor, see `sam.packed`.
        compile: the forward pass through torch.compile.
    """

    device: torch.device
    bf16: bool = False
    checkpointing: bool = False
    channels_last: bool = False
    packed: bool = False
    compile: bool = False

    def autocast(self) -> torch.autocast:
        """The context to call the network in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def __str__(self) -> str:
        on = [
            field.name.replace("_", "-")
            for field in dataclasses.fields(self)
            if field.name != "device" and getattr(self, field.name)
        ]
        return f"{self.device}, {', '.join(on) or 'fp32'}"


def choose(
    network: Network,
    device: torch.device,
    precision: str,
    batch: int,
    checkpointing: str = "auto",
    channels_last: str = "auto",
    packed: str = "auto",
    compile: str = "auto",
    memory_bytes: float | None = None,
) -> Runtime:
    """Decides what is left to `auto`.

    bf16 where the device computes in it; checkpointing where a step's activations would take
    more than 80 % of the free memory; channels-last on a GPU; packed weights on a CPU; the
    compiler nowhere, since its minutes come back only in long runs. Nothing that changes a
    rounding depends on free memory: equal seeds give equal bytes.

    Args:
        network: the network; checkpointing and packed, of SAM's encoder, are off for another.
        device: where it will live.
        precision: `fp32`, `bf16` or `auto`.
        batch: images in a step.
        checkpointing, channels_last, packed, compile: `auto`, `on` or `off`.
        memory_bytes: free memory; None asks the device.

    Raises:
        ValueError: on another choice.
    """
    for name, value in (
        ("checkpointing", checkpointing),
        ("channels_last", channels_last),
        ("packed", packed),
        ("compile", compile),
    ):
        if value not in SWITCHES:
            raise ValueError(f"{name}: {value!r} is unknown; expected one of {SWITCHES}")
    if not isinstance(network, Segmenter):
        checkpointing = packed = "off"
    bf16 = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    packable = available(device, bf16)
    if packed == "on" and not packable:
        raise ValueError(
            f"packed: 'on' cannot be met on {device} in {'bf16' if bf16 else 'fp32'}; take 'auto'"
        )
    needed = step_bytes(network, batch, device, bf16) if isinstance(network, Segmenter) else 0
    free = free_memory(device) if memory_bytes is None else memory_bytes
    return Runtime(
        device=device,
        bf16=bf16,
        checkpointing=_decided(checkpointing, needed > 0.8 * free),
        channels_last=_decided(channels_last, device.type == "cuda"),
        packed=_decided(packed, packable and compile != "on"),  # the compiler has its own layouts
        compile=_decided(compile, False),
    )


def step_bytes(network: Segmenter, batch: int, device: torch.device, bf16: bool) -> int:
    """What a training step of the network keeps between its two passes, see `sam.memory`."""
    blocks = network.image_encoder.blocks
    weights = any(
        parameter.requires_grad and "lora" not in name
        for name, parameter in blocks.named_parameters()
    )
    return activation_bytes(
        network.arch,
        network.image_size,
        batch,
        network.classes,
        bf16,
        kernel="chunked" if device.type == "cpu" and not weights else "fused",
        trained_blocks=len(blocks) - network.frozen_blocks,
        weights=weights,
    )


def _decided(choice: str, automatic: bool) -> bool:
    return automatic if choice == "auto" else choice == "on"


def place(network: Network, runtime: Runtime) -> Network:
    """Puts the network on its device and into shape, in place.

    Frozen weights of linear and convolution layers are kept in bfloat16 where the network runs
    in it: autocast would round them to the same numbers again at every step.
    """
    network.to(runtime.device)
    if runtime.bf16:
        lower_frozen(network)
    if runtime.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.channels_last = runtime.channels_last
    if isinstance(network, Segmenter):
        _place_encoder(network.image_encoder, runtime)
    return network


def _place_encoder(encoder: ImageEncoder, runtime: Runtime) -> None:
    if runtime.packed:
        pack(encoder)
    encoder.checkpointing = runtime.checkpointing
    blocks: list[Any] = list(encoder.blocks)
    for block in blocks:
        block.attn.keep_scores = not runtime.checkpointing


def compiled(network: Network, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """What to call in the network's place: itself, or its compiled form."""
    if not runtime.compile:
        return network
    result: Callable[[Tensor], Tensor] = torch.compile(network)
    return result


@torch.no_grad()
def lower_frozen(network: nn.Module) -> None:
    """Frozen weights and biases of linear and convolution layers to bfloat16, in place."""
    for module in network.modules():
        if isinstance(module, _LOWERED):
            for parameter in (module.weight, module.bias):
                if parameter is not None and not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


def computes_bf16(device: torch.device | str) -> bool:
    """Whether the device multiplies matrices in bf16 instead of only storing it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, test, bool)()) for test in tests)


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take on the device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(float(psutil.virtual_memory().available), _left_in_group())


def _left_in_group() -> float:
    """What a container's limit leaves (control groups, version 2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = float((group / "memory.current").read_text(encoding="ascii"))
        details = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    if limit == "max":
        return float("inf")
    # Files that were read count as used, but make room when it is needed.
    files = sum(float(line.split()[1]) for line in details if line.startswith("inactive_file "))
    return float(limit) - used + files
