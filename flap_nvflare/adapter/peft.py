"""Our adapters in the layout of Hugging Face PEFT's LoRA for transformers' `SamModel`, and back.

Both compute W x + b + s B A x; ours has s = 1. SAM's encoder has one projection `qkv` for query,
key and value, on whose rows of q and v we have an adapter each. PEFT adapts whole layers:

    A = [A_q; A_v]  (2r, in)        B = [[B_q, 0], [0, 0], [0, B_v]]  (3 width, 2r)

The decoder's `q_proj` and `v_proj` are layers of their own and keep their rank r. A change of the
frozen base (`offset_a`, `offset_b`) is a product on the same rows and makes its slot's block wider.

Only tensors and plain values here; neither peft nor transformers is needed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
MODEL_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENCODER = re.compile(r"image_encoder\.blocks\.(\d+)\.attn\.qkv\.([qv])")
_DECODER = re.compile(r"(mask_decoder\.transformer\..+\.([qv])_proj)\.\2")
_QKV = re.compile(r"vision_encoder\.layers\.(\d+)\.attn\.qkv")
_PROJECTION = re.compile(r"mask_decoder\.transformer\..+\.([qv])_proj")
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight")
# Fields of PEFT's configuration that say nothing of what the factors compute. Any other that is
# set makes the adapter something else than s B A.
_PLAIN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
# Ways to draw the factors that leave the base as it is; pissa, olora, loftq and others do not.
_DRAWS = (True, False, "gaussian", "orthogonal")
_MOST_ALPHA = 1e6
_AGAIN = "train it again as plain LoRA on qkv, q_proj and v_proj"


class PeftError(ValueError):
    """A PEFT adapter is damaged or holds what ours can't; the message names module and mend."""


class Slot(NamedTuple):
    """What a PEFT adapter adds to the rows of one of our slots: B A, its scale in B.

    Attributes:
        module: name of the layer in transformers' SAM.
        b: (out, n).
        a: (n, in).
    """

    module: str
    b: Tensor
    a: Tensor


def to_peft(slots: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a PEFT adapter.

    Args:
        slots: B (out, n) and A (n, in) by the stem of the slot, such as
            `image_encoder.blocks.0.attn.qkv.q`; of each `qkv` both q and v.

    Raises:
        PeftError: if there are none, or a stem is none of a SAM's.
    """
    layers: defaultdict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for stem, pair in slots.items():
        module, slot = _module_of(stem)
        layers[module][slot] = pair
    if not layers:
        raise PeftError("there are no low-rank adapters; PEFT's layout holds nothing else")
    tensors, ranks = {}, {}
    for module, parts in sorted(layers.items()):
        b, a = _joint(parts) if _QKV.fullmatch(module) else next(iter(parts.values()))
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.float().contiguous()
        ranks[module] = a.shape[0]
    return tensors, _configuration(ranks)


def from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Slot]:
    """What a PEFT adapter adds, by the stem of our slot.

    Args:
        tensors: of `adapter_model.safetensors`.
        config: of `adapter_config.json`.

    Raises:
        PeftError: if it is no plain LoRA, adapts another layer than ours, or changes keys.
    """
    _check_plain(config)
    layers: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise PeftError(f"{key!r} is no factor of a LoRA; {_AGAIN}, without trained weights")
        if tensor.ndim != 2 or not tensor.is_floating_point() or not _sound(tensor):
            raise PeftError(f"{key!r} is no matrix of finite numbers; fetch or make the file again")
        layers[found[1]][found[2]] = tensor.float()
    slots: dict[str, Slot] = {}
    for module, factors in sorted(layers.items()):
        if len(factors) != 2 or factors["A"].shape[0] != factors["B"].shape[1]:
            raise PeftError(f"{module}: lora_A and lora_B do not go together; fetch the file again")
        slots |= _slots(module, _scaled(module, factors["B"], config), factors["A"])
    if not slots:
        raise PeftError(f"the adapter is empty; {_AGAIN}")
    return slots


def halves(slots: Mapping[str, Slot], widths: Mapping[str, int]) -> dict[str, Slot] | None:
    """The slots' own blocks of a layout that `to_peft` made, bit for bit.

    Args:
        slots: as `from_peft` gives them.
        widths: of every slot's block, by stem.

    Returns:
        The slots with their own columns of B and rows of A; None if it is another layout.
    """
    if slots.keys() != widths.keys():
        return None
    own = {}
    for stem, slot in slots.items():
        # The other block of a joint layer; a decoder's layer has none.
        other = widths.get(stem[:-1] + ("v" if stem.endswith("q") else "q"), 0)
        first = other if stem.endswith("v") else 0
        block = slice(first, first + widths[stem])
        outside = slot.b.clone()
        outside[:, block] = 0
        if slot.a.shape[0] != widths[stem] + other or outside.any():
            return None
        own[stem] = Slot(slot.module, slot.b[:, block], slot.a[block])
    return own


def _sound(tensor: Tensor) -> bool:
    """Whether no size is zero and no scale can take a number out of float32's range."""
    largest = float(tensor.abs().max()) if tensor.numel() else math.nan
    return largest * _MOST_ALPHA < torch.finfo(torch.float32).max


def _module_of(stem: str) -> tuple[str, str]:
    """The layer in transformers' SAM, and the slot `q` or `v` in it."""
    if found := _ENCODER.fullmatch(stem):
        return f"vision_encoder.layers.{found[1]}.attn.qkv", found[2]
    if found := _DECODER.fullmatch(stem):
        return found[1], found[2]
    raise PeftError(f"{stem!r} is no adapter of a SAM")


def _joint(parts: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """B (3 width, n) and A (n, in) of a layer `qkv`; the rows of k are zero."""
    (b_q, a_q), (b_v, a_v) = parts["q"], parts["v"]
    width, first = b_q.shape
    b = b_q.new_zeros(3 * width, first + b_v.shape[1])
    b[:width, :first] = b_q
    b[2 * width :, first:] = b_v
    return b, torch.cat([a_q, a_v])


def _configuration(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's configuration: alpha is the rank everywhere, so that the scale is 1.

    Every layer is named in full: a short name would also adapt blocks without an adapter.
    """
    rank = min(ranks.values())
    wider = {module: other for module, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": wider,
        "alpha_pattern": dict(wider),
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _check_plain(config: Mapping[str, Any]) -> None:
    """Raises: PeftError: if something is set that makes it more than s B A."""
    if config.get("peft_type") != "LORA":
        raise PeftError(f"peft_type is {config.get('peft_type')!r}, not LORA; {_AGAIN}")
    if (bias := config.get("bias", "none")) != "none":
        raise PeftError(f"bias is {bias!r}: our adapters have no bias; {_AGAIN}, with bias none")
    draw = config.get("init_lora_weights", True)
    if draw not in _DRAWS:
        raise PeftError(
            f"init_lora_weights is {draw!r}, which may change the base; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion, or train it again without"
        )
    for name in sorted(config.keys() - _PLAIN - {"bias", "init_lora_weights"}):
        if config[name]:
            raise PeftError(f"{name} is {str(config[name])[:80]}: more than LoRA; {_AGAIN}")


def _scaled(module: str, b: Tensor, config: Mapping[str, Any]) -> Tensor:
    """s B with PEFT's scale: alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise PeftError(f"alpha_pattern is {str(patterns)[:80]}, no names of layers with numbers")
    for key, value in patterns.items():
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise PeftError(
                f"alpha_pattern has {key[:80]!r}; write names of layers there, not expressions"
            )
        name = key.removeprefix("^")
        if module == name or (name == key and module.endswith(f".{name}")):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or not abs(alpha) < _MOST_ALPHA:
        raise PeftError(
            f"{module}: alpha is {str(alpha)[:80]}, expected a number below {_MOST_ALPHA:g}"
        )
    rank = b.shape[1]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return b if scale == 1 else b * scale


def _slots(module: str, b: Tensor, a: Tensor) -> dict[str, Slot]:
    if found := _PROJECTION.fullmatch(module):
        return {f"{module}.{found[1]}": Slot(module, b, a)}
    if not (found := _QKV.fullmatch(module)):
        raise PeftError(f"{module}: our adapters sit on qkv, q_proj and v_proj alone; {_AGAIN}")
    if b.shape[0] % 3:
        raise PeftError(f"{module}: lora_B has {b.shape[0]} rows, which are no q, k and v")
    q, k, v = b.chunk(3)
    if k.any():
        raise PeftError(
            f"{module}: lora_B has rows of k that are not zero (largest {float(k.abs().max()):.3g})"
            "; our adapters change q and v alone: set these rows to zero after every step"
        )
    stem = f"image_encoder.blocks.{found[1]}.attn.qkv"
    return {f"{stem}.q": Slot(module, q, a), f"{stem}.v": Slot(module, v, a)}
