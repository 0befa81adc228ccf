"""The weights in a reply: tensors, coded bytes or sealed ones, and the meta beside them."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from nvflare.apis.dxo import DXO
from nvflare.apis.filter import ContentBlockedException

from flap_nvflare.adapter.cipher import CIPHERTEXT, SEALED, WEIGHT
from flap_nvflare.adapter.container import CodecError, read_header
from flap_nvflare.adapter.parcel import CONTROL
from flap_nvflare.adapter.stages import StageError, parse
from flap_nvflare.adapter.update import UpdateError, UpdateSpec
from flap_nvflare.flare import messages
from flap_nvflare.flare.asked import Asked, is_number, same, short
from flap_nvflare.flare.filters import check_dxo
from flap_nvflare.flare.reports import check_report_fields, read_report
from flap_nvflare.settings import Federation

# A CKKS ciphertext takes 8 to 15 times the bytes of the float32 numbers in it, and is padded to
# whole pieces.
_SEALED_GROWTH, _SEALED_LEAST = 16, 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MB = 1_000_000


def check_weights(dxo: DXO, asked: Asked, federation: Federation, max_update_mb: float) -> None:
    """Whether the weights and their meta are those that the task asked for.

    Raises:
        ContentBlockedException: naming the first thing that may not leave.
    """
    spec = _check_meta(dxo, asked, federation)
    if type(dxo.data) is not dict:
        raise ContentBlockedException("the weights are no dict")
    data = dict(dxo.data)
    if set(data) == SEALED:
        size = _check_sealed(data, asked, federation)
        growth, least = _SEALED_GROWTH, _SEALED_LEAST
    elif federation.encryption == "he":
        raise ContentBlockedException("encryption is 'he', and the weights are not sealed")
    else:
        check_dxo(dxo, federation.method, parameters=federation.parameters)
        size = _check_plain_or_coded(data, asked, federation)
        growth, least = 1, 0
        if messages.CODED not in data:
            plain = {name for name in data if not name.startswith(CONTROL)}
            if plain != set(spec.shapes):
                raise ContentBlockedException("the spec names other tensors than there are")
    most = growth * max_update_mb * _MB + least
    if size > most:
        raise ContentBlockedException(
            f"an update of {size:,} bytes; this site's limits.max_update_mb allows {most:,.0f}"
        )


def _check_meta(dxo: DXO, asked: Asked, federation: Federation) -> UpdateSpec:
    allowed = {messages.SPEC, messages.ROUND, messages.WEIGHT, messages.REPORT}
    meta = dxo.meta
    if type(meta) is not dict or not {messages.SPEC} <= set(meta) <= allowed:
        raise ContentBlockedException(f"meta has other entries than {sorted(allowed)}")
    round_index = meta.get(messages.ROUND)
    expected = asked.round_index if asked.task == messages.TRAIN else federation.rounds
    if type(round_index) is not int or round_index != expected:
        raise ContentBlockedException(f"meta: the round is not {expected}")
    if messages.WEIGHT in meta and not is_number(meta[messages.WEIGHT]):
        raise ContentBlockedException("meta: the weight is no finite number")
    _check_report(meta.get(messages.REPORT, {}), asked, federation)
    return _check_spec(meta[messages.SPEC], asked, federation)


def _check_spec(value: object, asked: Asked, federation: Federation) -> UpdateSpec:
    try:
        spec = UpdateSpec.from_dict(value)
    except (UpdateError, TypeError, ValueError) as error:
        raise ContentBlockedException("meta: no spec that can be read") from error
    for name, shape in spec.shapes.items():
        if asked.shapes.get(name) != shape:
            raise ContentBlockedException(f"meta: the spec has {short(name)} of another shape")
    fits = (
        spec.method == federation.method
        and spec.dtype == "float32"
        and _SHA256.fullmatch(spec.base_sha256) is not None
        and 0 <= spec.rank <= federation.rank
    )
    if not fits or not same(value, {**spec.to_dict(), "shapes": value["shapes"]}):  # type: ignore[index]
        raise ContentBlockedException("meta: the spec is not that of the task's method")
    return spec


def _check_report(value: object, asked: Asked, federation: Federation) -> None:
    try:
        check_report_fields(value)
        report = read_report(value, tuple(federation.class_names))
    except (ValueError, TypeError) as error:
        raise ContentBlockedException(f"meta: the report: {error}") from error
    private = asked.task == messages.TRAIN and federation.dp_clip > 0
    if private and "privacy" not in report:
        raise ContentBlockedException("dp_clip is set, and nothing says that the update is private")


def _check_plain_or_coded(data: dict[str, Any], asked: Asked, federation: Federation) -> int:
    """Bytes of the tensors."""
    size = 0
    if messages.CODED in data:
        size += _check_coded(data.pop(messages.CODED), asked, federation)
    for name, tensor in data.items():
        shape = asked.shapes.get(name.removeprefix(CONTROL))
        if shape is None:
            raise ContentBlockedException(f"tensor {short(name)} is none of the network's")
        if name.startswith(CONTROL) and federation.optimizer != "scaffold":
            raise ContentBlockedException("control variates without optimizer 'scaffold'")
        if not _dense(tensor, torch.float32) or tuple(tensor.shape) != shape:
            raise ContentBlockedException(
                f"tensor {short(name)} is no float32 of shape {shape} and nothing else"
            )
        size += tensor.numel() * tensor.element_size()
    return size


def _check_coded(message: bytes, asked: Asked, federation: Federation) -> int:
    try:
        header, stages = read_header(message), parse(federation.upload).texts
    except (CodecError, StageError) as error:
        raise ContentBlockedException("coded bytes that can't be read") from error
    if header.stages != stages:
        raise ContentBlockedException("coded bytes of other stages than the task's upload")
    if unknown := set(header.names) - set(asked.shapes):
        raise ContentBlockedException(f"coded numbers of {short(min(unknown))}")
    most = sum(4 * math.prod(shape) for shape in asked.shapes.values()) + (1 << 16)
    if len(message) > most:
        raise ContentBlockedException(f"{len(message)} coded bytes, plain ones are {most}")
    return len(message)


def _check_sealed(data: dict[str, Any], asked: Asked, federation: Federation) -> int:
    if federation.encryption != "he":
        raise ContentBlockedException("sealed tensors without encryption 'he'")
    pieces, weight = data[CIPHERTEXT], data[WEIGHT]
    for tensor, dims in ((pieces, 2), (weight, 1)):
        if not _dense(tensor, torch.uint8) or tensor.dim() != dims:
            raise ContentBlockedException("sealed tensors of another form")
    plain = sum(4 * math.prod(shape) for shape in asked.shapes.values())
    size = int(pieces.numel() + weight.numel())
    if weight.numel() != 8 or size > _SEALED_GROWTH * plain + _SEALED_LEAST:
        raise ContentBlockedException(f"{size} sealed bytes for {plain} plain ones")
    return size


def _dense(tensor: object, dtype: torch.dtype) -> bool:
    """A plain tensor on the CPU that has no more memory than its values."""
    return (
        type(tensor) is torch.Tensor
        and tensor.dtype == dtype
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_nested
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )
