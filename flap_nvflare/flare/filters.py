"""The DXO filter that lets only the tensors of the federation's method pass, both ways.

A gate, not a sieve: a message whose body holds anything else is blocked whole, and what the
filter does not understand is blocked as well. It works on names alone, so it needs no model and
no message can talk it into another list. Headers are FLARE's own and not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from flap_nvflare.flare.context import read_federation
from flap_nvflare.sam.tuning import travels

_DXO_KEYS = {"DXO"}
_ENVELOPE = {ReservedHeaderKey.HEADERS, ReservedKey.TASK_NAME}


class AdapterOnlyFilter(Filter):
    """Lets through weights whose names belong to `method`, metrics, and error replies.

    Args:
        method: one of the seven methods of `sam.tuning`; empty reads the method from the
            job's own `federation.yaml` at this site.
    """

    def __init__(self, method: str = "") -> None:
        super().__init__()
        self.method = method

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Returns the message untouched.

        Raises:
            ContentBlockedException: naming the first thing that may not pass.
        """
        if shareable.get_return_code(ReturnCode.OK) != ReturnCode.OK:
            return _bare_error(shareable)
        method = self.method or read_federation(fl_ctx).method
        extra = set(shareable) - _ENVELOPE - _DXO_KEYS
        if extra:
            raise ContentBlockedException(f"field {min(map(str, extra))!r} may not travel")
        if _DXO_KEYS & set(shareable):
            _check_dxo(_read(shareable), method)
        return shareable


def _read(shareable: Shareable) -> DXO:
    try:
        return from_shareable(shareable)
    except Exception as error:  # FLARE raises several types for what a peer may send
        raise ContentBlockedException(f"a DXO that can't be read: {error}") from error


def _bare_error(shareable: Shareable) -> Shareable:
    """An error reply keeps its headers and loses any data."""
    for key in set(shareable) - _ENVELOPE:
        shareable.pop(key)
    return shareable


def _check_dxo(dxo: DXO, method: str) -> None:
    if dxo.data_kind == DataKind.COLLECTION:
        for part in dict(dxo.data).values():
            if not isinstance(part, DXO):
                raise ContentBlockedException("a collection may hold only DXOs")
            _check_dxo(part, method)
    elif dxo.data_kind == DataKind.WEIGHTS:
        for name, tensor in dict(dxo.data).items():
            if not isinstance(name, str) or not travels(method, name):
                raise ContentBlockedException(
                    f"tensor {name!r} is not among those of method {method!r} and may not travel"
                )
            if not isinstance(tensor, torch.Tensor):
                raise ContentBlockedException(f"{name!r} is {type(tensor).__name__}, no tensor")
    elif dxo.data_kind == DataKind.METRICS:
        _check_plain(dxo.data, "metrics")
    else:
        raise ContentBlockedException(f"a DXO of kind {dxo.data_kind!r} may not travel")
    _check_plain(dxo.meta, "meta")


def _check_plain(value: Any, place: str) -> None:
    """Only numbers, strings and containers of them: nothing that could carry tensors."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_plain(part, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_plain(part, place)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise ContentBlockedException(f"{place} holds {type(value).__name__}, no plain value")
