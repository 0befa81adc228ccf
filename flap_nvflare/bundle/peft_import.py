"""An adapter's file from a LoRA of Hugging Face PEFT on transformers' SAM.

A folder that `peft_export` wrote gives the adapter's file again, byte by byte. Of any other plain
LoRA on `qkv`, `q_proj` and `v_proj` the products are taken over exactly where they fit into the
rank of the settings; where not, only a cut that was asked for is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flap_nvflare.adapter.factors import LORA_A, LORA_B, pairs
from flap_nvflare.adapter.peft import CONFIG_FILE, MODEL_FILE, PeftError, Slot, from_peft, halves
from flap_nvflare.adapter.update import (
    UpdateError,
    UpdateSpec,
    content_sha256,
    load_update,
    save_update,
)
from flap_nvflare.aggregation.cut import cut_stack
from flap_nvflare.aggregation.products import Factors
from flap_nvflare.bundle.builders import make_network, make_parts
from flap_nvflare.bundle.peft_export import ADAPTER, ADAPTER_SHA256, HEAD_FILE
from flap_nvflare.bundle.trained import SETTINGS, sam_only, weights_file
from flap_nvflare.sam import tuning
from flap_nvflare.sam.offset import OFFSET_A, OFFSET_B
from flap_nvflare.settings import NAMED, Federation, OtherBaseError, SettingsError, Site

if TYPE_CHECKING:
    from flap_nvflare.sam.segmenter import Segmenter

# Below this share of its norm a product has lost nothing that float32 factors could resolve.
_RESOLUTION = 2.0**-23


@dataclass(frozen=True)
class Imported:
    """An adapter that was written.

    Attributes:
        file: the adapter's file.
        rank: its rank.
        same: whether it is the file that the folder was made from, byte by byte.
        head: whether the output layers came with the folder; else they are the seed's.
        lost: largest relative error of a product (Frobenius norm); 0 where nothing was cut.
        lost_in: the layer that has it.
    """

    file: str
    rank: int
    same: bool
    head: bool
    lost: float = 0.0
    lost_in: str = ""


@dataclass(frozen=True)
class _Beside:
    """What stands beside PEFT's files in our `head.safetensors`; empty without it.

    Attributes:
        tensors: what trained beside the factors.
        base_sha256: the base of it all.
        extra: the texts in the metadata of the adapter's file.
        adapter: what that file looked like.
        sha256: of its content.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    base_sha256: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    adapter: UpdateSpec | None = None
    sha256: str = ""


def import_peft(
    folder: Path | str,
    out: Path | str,
    checkpoint: Path | str = "",
    federation: Federation | None = None,
    cut: bool = False,
) -> Imported:
    """Writes an adapter's file from a PEFT adapter.

    Args:
        folder: with PEFT's two files.
        out: the file to write.
        checkpoint: file of SAM's weights; empty as in `trained.weights_file`.
        federation: settings of the adapter; None for those in the folder's `head.safetensors`.
        cut: whether a product of a higher rank than the settings' becomes the nearest of theirs.

    Raises:
        PeftError: if a file is missing or damaged, or holds what our adapters can't.
        OtherBaseError: if the folder's adapter was trained on another base.
        SettingsError: if there are no settings.
    """
    folder, out = Path(folder), Path(out)
    slots = from_peft(*_read(folder))
    beside = _read_beside(folder)
    settings = federation or _settings(folder, beside)
    network = _network(settings, checkpoint, beside.base_sha256, folder)
    _take_head(network, beside.tensors, folder)
    fixed = tuning.fixed(network, make_parts(settings))
    adapter = beside.adapter if federation is None else None
    blocks = None if adapter is None else halves(slots, _widths(adapter))
    extra = {SETTINGS: json.dumps(settings.to_dict())}
    if adapter is not None and blocks is not None:
        tensors = _as_it_was(network, blocks, adapter)
        _check_fixed(settings, fixed, tensors)
        for name in sorted(adapter.shapes.keys() - tensors.keys()):
            raise PeftError(
                f"{folder / HEAD_FILE}: its adapter had {name[:200]!r}, which is no part of the "
                "network; make the folder again"
            )
        tensors = {name: tensors[name] for name in adapter.shapes}
        same = content_sha256(tensors) == beside.sha256
        # What else the file said, such as its round, holds for the same numbers alone.
        save_update(out, tensors, adapter, beside.extra if same else extra)
        return Imported(str(out), adapter.rank, same, head=True)
    lost = _fit(network, slots, cut)
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    _check_fixed(settings, fixed, tensors)
    tensors = {name: tensors[name] for name in tuning.trainable(network, make_parts(settings))}
    spec = UpdateSpec.of(tensors, settings.method, settings.rank, network.base_sha256)
    save_update(out, tensors, spec, extra)
    worst = max(lost, key=lambda module: lost[module], default="")
    return Imported(
        str(out), settings.rank, False, bool(beside.tensors), lost.get(worst, 0.0), worst
    )


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors and configuration."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / MODEL_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise PeftError(
            f"{folder}: no whole PEFT adapter ({error}); it needs {CONFIG_FILE} and {MODEL_FILE}"
        ) from error
    if not isinstance(config, dict):
        raise PeftError(f"{folder / CONFIG_FILE}: is no JSON object; fetch or make it again")
    return tensors, config


def _read_beside(folder: Path) -> _Beside:
    """Raises: UpdateError: if `head.safetensors` is damaged or another program's."""
    path = folder / HEAD_FILE
    if not path.exists():
        return _Beside()
    tensors, spec, extra = load_update(path)
    try:
        adapter = UpdateSpec.from_dict(json.loads(extra.pop(ADAPTER)))
        sha256 = extra.pop(ADAPTER_SHA256)
    except (KeyError, ValueError) as error:
        raise UpdateError(f"{path}: says nothing of its adapter; make the folder again") from error
    return _Beside(tensors, spec.base_sha256, extra, adapter, sha256)


def _settings(folder: Path, beside: _Beside) -> Federation:
    """The settings that the adapter was made with, at its own rank."""
    if beside.adapter is None or SETTINGS not in beside.extra:
        raise SettingsError(
            f"{folder}: has no {HEAD_FILE} with settings; name them with --federation FILE"
        )
    try:
        values = json.loads(beside.extra[SETTINGS])
        return Federation.from_dict({**values, "rank": beside.adapter.rank, "site_ranks": {}})
    except (ValueError, TypeError) as error:
        raise SettingsError(
            f"{folder / HEAD_FILE}: its settings can't be read ({error}); name others with "
            "--federation FILE"
        ) from error


def _network(settings: Federation, checkpoint: Path | str, sha256: str, folder: Path) -> Segmenter:
    """The network of the settings, on the base with that SHA-256 if there is one."""
    if settings.method == NAMED or not tuning.method_named(settings.method).lora:
        raise SettingsError(
            f"setting method: {settings.method!r} has no low-rank adapters; take flap or lora"
        )
    if make_parts(settings).trains == "core":
        raise SettingsError(
            f"setting rule: {settings.rule!r} trains a core between the factors, of which PEFT "
            "knows the product alone; name settings with another rule, such as mean"
        )
    weights = weights_file(settings, checkpoint)
    network = make_network(settings, Site("import", Path(), checkpoint=weights))
    if sha256 and network.base_sha256 != sha256:
        raise OtherBaseError(
            f"{folder}: was trained on the base with SHA-256 {sha256}, but "
            f"{weights or settings.base} has {network.base_sha256}; give the right file of "
            "weights"
        )
    return sam_only(network, folder)


def _take_head(network: Segmenter, head: Mapping[str, Tensor], folder: Path) -> None:
    """Copies what trained beside the factors."""
    places = dict(network.named_parameters())
    for name, tensor in head.items():
        if name not in places or places[name].shape != tensor.shape:
            raise PeftError(
                f"{folder / HEAD_FILE}: {name} {tuple(tensor.shape)} has no place in the network "
                "of the settings; give settings with the same backbone and classes"
            )
        places[name].data.copy_(tensor)


def _widths(adapter: UpdateSpec) -> dict[str, int]:
    """Directions of every slot in PEFT's file: the adapter's and the offset's."""
    shapes = adapter.shapes
    stems = {name.rsplit(".", 1)[0] for name in shapes if name.endswith((LORA_A, LORA_B))}
    return {stem: adapter.rank + shapes.get(stem + OFFSET_A, (0,))[0] for stem in sorted(stems)}


def _as_it_was(
    network: Segmenter, blocks: Mapping[str, Slot], adapter: UpdateSpec
) -> dict[str, Tensor]:
    """The tensors of the adapter's file bit for bit, and the factors that it leaves to the seed."""
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters()}
    rank = adapter.rank
    for stem, slot in blocks.items():
        tensors |= {stem + LORA_B: slot.b[:, :rank], stem + LORA_A: slot.a[:rank]}
        tensors |= {stem + OFFSET_B: slot.b[:, rank:], stem + OFFSET_A: slot.a[rank:]}
    return tensors


@torch.no_grad()
def _fit(network: Segmenter, slots: Mapping[str, Slot], cut: bool) -> dict[str, float]:
    """Gives the network's adapters the products of the slots; says what was lost, by layer."""
    places = dict(network.named_parameters())
    known = {pair.stem: pair for pair in pairs(n for n in places if n.endswith((LORA_A, LORA_B)))}
    lost: dict[str, float] = {}
    for stem, slot in slots.items():
        if stem not in known:
            raise PeftError(
                f"{slot.module}: the network of the settings has no adapter there; mend arch or "
                "lora_blocks in the settings"
            )
        a, b = places[known[stem].a], places[known[stem].b]
        if (slot.b.shape[0], slot.a.shape[1]) != (b.shape[0], a.shape[1]):
            raise PeftError(
                f"{slot.module}: changes ({slot.b.shape[0]}, {slot.a.shape[1]}) weights, the "
                f"network's are ({b.shape[0]}, {a.shape[1]}); mend arch in the settings"
            )
        slot, share = _of_rank(slot, a.shape[0], cut)
        if share:
            lost[slot.module] = max(share, lost.get(slot.module, 0.0))
        # Directions to spare keep A as drawn: with B at zero they add nothing, and can train.
        count = slot.a.shape[0]
        a[:count] = slot.a
        b.zero_()
        b[:, :count] = slot.b
    return lost


def _of_rank(slot: Slot, rank: int, cut: bool) -> tuple[Slot, float]:
    """The slot's product in at most `rank` directions, and the share of its norm that is lost."""
    used = slot.b.any(dim=0)
    if int(used.sum()) <= rank:
        return slot._replace(b=slot.b[:, used], a=slot.a[used]), 0.0
    done = cut_stack([Factors("", 1.0, slot.b[:, used], slot.a[used])], "balanced", rank)
    share = (done.lost / done.exact) ** 0.5 if done.exact else 0.0
    if share <= _RESOLUTION:
        share = 0.0
    if share and not cut:
        raise PeftError(
            f"{slot.module}: has more directions than rank {rank} holds, {share:.2g} of its norm "
            f"would be lost; set rank up to {int(used.sum())} in the settings, or cut it (--cut)"
        )
    return slot._replace(b=done.b.float(), a=done.a.float()), share


def _check_fixed(
    settings: Federation, fixed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Raises: SettingsError: if a factor that the rule leaves as drawn is another."""
    for name, drawn in fixed.items():
        if not torch.equal(tensors[name], drawn):
            raise SettingsError(
                f"setting rule: {settings.rule!r} leaves {name} as the seed draws it, and the "
                "folder has another; name settings with another rule, such as mean"
            )
