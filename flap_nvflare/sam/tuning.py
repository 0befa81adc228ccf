"""What trains and travels: the seven methods of arXiv 2407.21739 as sets of parameter names.

A method is a set of groups and a group is a rule on names alone, so a site's filter can judge an
update without building a network. Names are segment_anything's own, plus `.lora_a`, `.lora_b` and
`.lora_core` of adapters, and `.offset_a` and `.offset_b` of a change of the frozen base.

| method | groups |
|---|---|
| full | every weight of SAM with its new head; no adapters |
| attention | encoder attention, decoder transformer |
| decoder | the whole mask decoder |
| partial_decoder | up-scaler, hyper-networks, mask tokens |
| lora | adapters alone; the fresh head stays as it was drawn |
| lora_decoder | adapters, the whole mask decoder (SAMed) |
| flap | adapters, up-scaler, hyper-networks, mask tokens |

Of another network than SAM, that of a site's own bundle, the settings name the parameters by
patterns: the method `named`.

Which factors of an adapter train, and what of all that trains leaves the site, depends on the rule
of aggregation as well: see `Parts`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor, nn

from flap_nvflare.settings import NAMED

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
_ADAPTED = (
    rf"(image_encoder\.blocks\.{_N}\.attn\.qkv\.[qv]"
    rf"|mask_decoder\.transformer\.{_DECODER_ATTENTION}\.(q_proj\.q|v_proj\.v))"
)
ADAPTERS = rf"{_ADAPTED}\.lora_(a|b|core)"
OFFSETS = rf"{_ADAPTED}\.offset_[ab]"
EVERYTHING = rf"{ENCODER_ATTENTION}|{ENCODER_REST}|{PROMPTS}|{DECODER}"
LORA_A, LORA_B, LORA_CORE = LORA_SUFFIXES = (".lora_a", ".lora_b", ".lora_core")
# A name of another network: none that means a factor, a control or coded bytes in a message.
_OF_FACTORS = (*LORA_SUFFIXES, ".offset_a", ".offset_b")
_PLAIN = re.compile(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_]{1,100}){1,20}")
# Which factors train, by what a rule says of itself (`aggregation.rule.Card.trains`).
TRAINED = {
    "ab": (LORA_A, LORA_B),
    "b": (LORA_B,),
    "alternate": (LORA_A, LORA_B),
    "core": (LORA_CORE,),
}
PERSONAL = ("none", "head", "ditto")


@dataclass(frozen=True)
class Method:
    """A method's parameters.

    Attributes:
        weights: patterns of the names of weights of SAM and of the head.
        lora: whether the network has adapters and they train.
        parameters: instead, names of parameters of another network, `*` for any characters.
    """

    weights: tuple[str, ...] = ()
    lora: bool = False
    parameters: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether the parameter `name` belongs to the method."""
        if self.parameters:
            if not _PLAIN.fullmatch(name) or name.endswith(_OF_FACTORS):
                return False
            return any(fnmatchcase(name, one) for one in self.parameters)
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
class Parts:
    """What trains at a site, what travels, what stays there, and what never changes.

    | rule trains | trains | fixed as drawn | travels up in round t |
    |---|---|---|---|
    | ab | A, B | | A, B |
    | b | B | A | B |
    | alternate | B in even rounds, A in odd ones | | the factor that trained |
    | core | R of B R A | A, B | R |

    All other weights of the method train and travel with them, but what is private. Down comes
    all that is shared in any round. Fixed factors are drawn from the federation's seed at every
    site and at the server, and never travel.

    Attributes:
        method: one of `METHODS`, or `named`.
        trains: which factors train, one of `TRAINED`.
        stays: the factors that train but stay at their site: nothing, or `b`.
        personal: with `head` the output layers (`OUTPUT`) train but stay at their site; `none`
            and `ditto` (a second adapter of the site's own) change nothing here.
        offset: whether a change of the frozen base comes down besides.
        parameters: what `named` names.

    Raises:
        ValueError: on an unknown value, or if nothing that trains were left to travel.
    """

    method: str
    trains: str = "ab"
    stays: str = ""
    personal: str = "none"
    offset: bool = False
    parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lora = self._method.lora
        for name, known in (
            ("trains", tuple(TRAINED)),
            ("stays", ("", "b")),
            ("personal", PERSONAL),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: {value!r} is unknown; expected one of {known}")
        if not lora and (self.trains != "ab" or self.stays or self.offset):
            raise ValueError(
                f"method {self.method!r} has no adapters, which the rule needs; take flap, lora "
                "or lora_decoder, or the rule mean or svd"
            )
        if self.offset and self._method.holds(
            "mask_decoder.transformer.layers.0.self_attn.q_proj.weight"
        ):
            raise ValueError(
                f"method {self.method!r} trains weights under adapters, which the rule would "
                "change; take flap or lora"
            )
        if self.stays and self.trains != "ab":
            raise ValueError(f"where {self.trains!r} trains, 'b' cannot stay; nothing would travel")
        head = not self.parameters and self._method.holds("mask_decoder.mask_tokens.weight")
        if self.personal == "head" and (not head or self.method == "partial_decoder"):
            raise ValueError(
                f"personal 'head': method {self.method!r} trains "
                f"{'nothing but the head' if head else 'no head'}; take flap or personal 'none'"
            )

    @property
    def _method(self) -> Method:
        return method_named(self.method, self.parameters)

    def trained(self, name: str, round_index: int | None = None) -> bool:
        """Whether the parameter `name` trains in that round; without a round, in any."""
        if not self._method.holds(name):
            return False
        if not name.endswith(LORA_SUFFIXES):
            return True
        suffixes = TRAINED[self.trains]
        if self.trains == "alternate" and round_index is not None:
            suffixes = (LORA_A if round_index % 2 else LORA_B,)
        return name.endswith(suffixes)

    def private(self, name: str) -> bool:
        """Whether `name` trains but never leaves its site."""
        if self.personal == "head" and re.fullmatch(OUTPUT, name):
            return True
        return self.stays == "b" and name.endswith(LORA_B) and self.trained(name)

    def fixed(self, name: str) -> bool:
        """Whether `name` is a factor that stays as the seed drew it."""
        if not re.fullmatch(ADAPTERS, name) or name.endswith(LORA_CORE):
            return False
        return self._method.lora and not self.trained(name)

    def up(self, name: str, round_index: int | None = None) -> bool:
        """Whether `name` leaves the site after that round; without a round, after any."""
        return self.trained(name, round_index) and not self.private(name)

    def down(self, name: str) -> bool:
        """Whether `name` comes down: all that travels up in any round, and the offset."""
        return self.up(name) or (self.offset and re.fullmatch(OFFSETS, name) is not None)


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


def method_named(method: str, parameters: tuple[str, ...] = ()) -> Method:
    """The method of that name; of `named` the one that trains what `parameters` name.

    Raises:
        ValueError: on an unknown name, or if nothing is named.
    """
    if method == NAMED and parameters:
        return Method(parameters=parameters)
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is unknown; expected one of {tuple(METHODS)}")
    return METHODS[method]


def travels(method: str, name: str, offset: bool = False, parameters: tuple[str, ...] = ()) -> bool:
    """Whether the parameter called `name` may travel under `method`, whatever the rule.

    Names alone decide: a name of the right form that no network has is refused elsewhere, by
    comparing names and shapes with the network's. What of these names travels under one rule,
    and when, `Parts` says.

    Args:
        method: one of `METHODS`, or `named`.
        name: the name of a tensor.
        offset: on the way down of a rule that changes the frozen base.
        parameters: what `named` names.
    """
    chosen = method_named(method, parameters)
    if offset and chosen.lora and re.fullmatch(OFFSETS, name):
        return True
    return chosen.holds(name)


def trainable(model: nn.Module, method: str | Parts) -> dict[str, nn.Parameter]:
    """The parameters of `model` that train (in any round), sorted by name.

    Args:
        model: the network.
        method: the parts; a method's name stands for both factors of every adapter.
    """
    trained = _parts(method).trained
    return {name: p for name, p in sorted(model.named_parameters()) if trained(name)}


def fixed(model: nn.Module, parts: Parts) -> dict[str, Tensor]:
    """Copies on the CPU of the factors that stay as the seed drew them, sorted by name.

    Site and server each draw them; their SHA-256 tells whether both drew the same.
    """
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in sorted(model.named_parameters())
        if parts.fixed(name)
    }


def freeze(model: nn.Module, method: str | Parts) -> None:
    """Sets `requires_grad` on exactly the parameters that train (in any round)."""
    model.requires_grad_(False)
    for parameter in trainable(model, method).values():
        parameter.requires_grad_(True)


def _parts(method: str | Parts) -> Parts:
    return method if isinstance(method, Parts) else Parts(method)


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
