"""What trains and travels: the seven methods of arXiv 2407.21739 as sets of parameter names.

A method is a set of groups and a group is a rule on names alone, so a site's filter can judge an
update without building a network. Names are segment_anything's own, plus `.lora_a` and `.lora_b`.

| method | groups |
|---|---|
| full | every weight of SAM with its new head; no adapters |
| attention | encoder attention, decoder transformer |
| decoder | the whole mask decoder |
| partial_decoder | up-scaler, hyper-networks, mask tokens |
| lora | adapters alone; the fresh head stays as it was drawn |
| lora_decoder | adapters, the whole mask decoder (SAMed) |
| flap | adapters, up-scaler, hyper-networks, mask tokens |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from flap_nvflare.sam.backbone import Architecture

ENCODER_ATTENTION = r"image_encoder\.blocks\.\d+\.attn\."
DECODER_TRANSFORMER = r"mask_decoder\.transformer\."
DECODER = r"mask_decoder\."
OUTPUT = r"mask_decoder\.(output_upscaling|output_hypernetworks_mlps|mask_tokens)\."
EVERYTHING = r"(image_encoder|prompt_encoder|mask_decoder)\."
LORA_SUFFIXES = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class Method:
    """A method's parameters.

    Attributes:
        weights: patterns that a weight of SAM or of the head begins with.
        lora: whether the network has adapters and they train.
    """

    weights: tuple[str, ...] = ()
    lora: bool = False

    def holds(self, name: str) -> bool:
        """Whether the parameter `name` belongs to the method."""
        if name.endswith(LORA_SUFFIXES):
            return self.lora and re.match(EVERYTHING, name) is not None
        return any(re.match(pattern, name) for pattern in self.weights)


METHODS: dict[str, Method] = {
    "full": Method((EVERYTHING,)),
    "attention": Method((ENCODER_ATTENTION, DECODER_TRANSFORMER)),
    "decoder": Method((DECODER,)),
    "partial_decoder": Method((OUTPUT,)),
    "lora": Method(lora=True),
    "lora_decoder": Method((DECODER,), lora=True),
    "flap": Method((OUTPUT,), lora=True),
}


@dataclass(frozen=True)
class Count:
    """Size of what a method sends in one transfer: one client, one direction, one round.

    Attributes:
        method: name of the method.
        parameters: numbers that train and travel.
        bytes: their size in float32, without the message's own overhead.
        reduction: how many times fewer they are than those of `full`.
    """

    method: str
    parameters: int
    bytes: int
    reduction: float


def method_named(method: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: on an unknown name.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is unknown; expected one of {tuple(METHODS)}")
    return METHODS[method]


def travels(method: str, name: str) -> bool:
    """Whether the parameter called `name` trains and travels under `method`.

    Names alone decide: a name of the right form that no network has is refused elsewhere, by
    comparing names and shapes with the network's.
    """
    return method_named(method).holds(name)


def trainable(model: nn.Module, method: str) -> dict[str, nn.Parameter]:
    """The parameters of `model` that train and travel under `method`, sorted by name."""
    holds = method_named(method).holds
    return {name: p for name, p in sorted(model.named_parameters()) if holds(name)}


def freeze(model: nn.Module, method: str) -> None:
    """Sets `requires_grad` on exactly the parameters that train under `method`."""
    model.requires_grad_(False)
    for parameter in trainable(model, method).values():
        parameter.requires_grad_(True)


def count(arch: str | Architecture, image_size: int, classes: int, rank: int) -> list[Count]:
    """Size of every method, from the network's shapes; no weights are needed or made.

    Args:
        arch: name of a backbone.
        image_size: side of the input in pixels.
        classes: foreground classes, C.
        rank: rank of the adapters.
    """
    from flap_nvflare.sam.segmenter import blank_segmenter  # imports segment_anything

    model = blank_segmenter(arch, image_size, classes, rank, lora=True)
    numbers = {
        method: sum(p.numel() for p in trainable(model, method).values()) for method in METHODS
    }
    return [
        Count(method, number, 4 * number, numbers["full"] / number)
        for method, number in numbers.items()
    ]
