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

# Whole names, so that nothing can ride along under a name that only begins right.
_N = r"[0-9]{1,3}"
_AFFINE = r"\.(weight|bias)"
_DECODER_ATTENTION = (
    rf"(layers\.{_N}\.(self_attn|cross_attn_token_to_image|cross_attn_image_to_token)"
    r"|final_attn_token_to_image)"
)
ENCODER_ATTENTION = rf"image_encoder\.blocks\.{_N}\.attn\.((qkv|proj){_AFFINE}|rel_pos_[hw])"
ENCODER_REST = (
    rf"image_encoder\.(pos_embed|(patch_embed\.proj|neck\.{_N}){_AFFINE}"
    rf"|blocks\.{_N}\.(norm[12]|mlp\.lin[12]){_AFFINE})"
)
PROMPTS = (
    rf"prompt_encoder\.((point_embeddings\.{_N}|not_a_point_embed|no_mask_embed)\.weight"
    rf"|mask_downscaling\.{_N}{_AFFINE})"
)
DECODER_TRANSFORMER = (
    rf"mask_decoder\.transformer\.({_DECODER_ATTENTION}\.(q|k|v|out)_proj"
    rf"|layers\.{_N}\.(norm[1-4]|mlp\.lin[12])|norm_final_attn){_AFFINE}"
)
OUTPUT = (
    rf"mask_decoder\.((output_upscaling\.{_N}|output_hypernetworks_mlps\.{_N}\.layers\.{_N})"
    rf"{_AFFINE}|mask_tokens\.weight)"
)
QUALITY = rf"mask_decoder\.(iou_token\.weight|iou_prediction_head\.layers\.{_N}{_AFFINE})"
DECODER = rf"{DECODER_TRANSFORMER}|{OUTPUT}|{QUALITY}"
ADAPTERS = (
    rf"(image_encoder\.blocks\.{_N}\.attn\.qkv\.[qv]"
    rf"|mask_decoder\.transformer\.{_DECODER_ATTENTION}\.(q_proj\.q|v_proj\.v))\.lora_[ab]"
)
EVERYTHING = rf"{ENCODER_ATTENTION}|{ENCODER_REST}|{PROMPTS}|{DECODER}"
LORA_SUFFIXES = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class Method:
    """A method's parameters.

    Attributes:
        weights: patterns of the names of weights of SAM and of the head.
        lora: whether the network has adapters and they train.
    """

    weights: tuple[str, ...] = ()
    lora: bool = False

    def holds(self, name: str) -> bool:
        """Whether the parameter `name` belongs to the method."""
        patterns = (*self.weights, ADAPTERS) if self.lora else self.weights
        return any(re.fullmatch(pattern, name) for pattern in patterns)


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
