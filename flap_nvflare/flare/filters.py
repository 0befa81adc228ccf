"""The DXO filter that lets only the tensors of the federation's method pass, both ways.

A gate, not a sieve: a message whose body holds anything else is blocked whole, and what the
filter does not understand is blocked as well. It works on names alone, so it needs no model and
no message can talk it into another list. Headers are FLARE's own and not looked at here:
`last_gate` has the last word on a whole reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from flap_nvflare.adapter.container import CodecError, names
from flap_nvflare.adapter.parcel import CONTROL
from flap_nvflare.flare import messages
from flap_nvflare.flare.context import read_federation
from flap_nvflare.flare.error_log import tells_why
from flap_nvflare.sam.tuning import travels

DXO_KEYS = {"DXO"}
ENVELOPE = {ReservedHeaderKey.HEADERS, ReservedKey.TASK_NAME}


class AdapterOnlyFilter(Filter):
    """Lets through weights whose names belong to `method`, metrics, and error replies.

    Args:
        method: a method of `sam.tuning`; empty reads it from the job's own `federation.yaml` at
            this site.
        offset: whether a change of the frozen base may pass besides, as rules `residual` and
            `stack` send it; for messages to the site, never for those that leave it.
        parameters: the names of method `named`.
    """

    def __init__(
        self, method: str = "", offset: bool = False, parameters: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.method = method
        self.offset = offset
        self.parameters = list(parameters)

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Returns the message untouched.

        Raises:
            ContentBlockedException: naming the first thing that may not pass.
        """
        if shareable.get_return_code(ReturnCode.OK) != ReturnCode.OK:
            return bare_error(shareable)
        method, parameters = self.method, tuple(self.parameters)
        if not method:
            federation = read_federation(fl_ctx)
            method, parameters = federation.method, federation.parameters
        check_body(shareable, method, self.offset, parameters)
        return shareable


def check_body(
    shareable: Shareable, method: str, offset: bool = False, parameters: tuple[str, ...] = ()
) -> None:
    """Whether a message that is no error reply may travel under `method` (and its `parameters`).

    Raises:
        ContentBlockedException: naming the first thing that may not pass.
    """
    extra = set(shareable) - ENVELOPE - DXO_KEYS
    if extra:
        raise ContentBlockedException(f"field {min(map(str, extra))!r} may not travel")
    if DXO_KEYS & set(shareable):
        check_dxo(read_body(shareable), method, offset, parameters)


def read_body(shareable: Shareable) -> DXO:
    """The message's DXO.

    Raises:
        ContentBlockedException: if there is none that can be read.
    """
    try:
        return from_shareable(shareable)
    except Exception as error:  # FLARE raises several types for what a peer may send
        raise ContentBlockedException(f"a DXO that can't be read: {error}") from error


def bare_error(shareable: Shareable) -> Shareable:
    """An error reply keeps its headers and loses any data."""
    for key in set(shareable) - ENVELOPE:
        shareable.pop(key)
    return shareable


def check_dxo(
    dxo: DXO, method: str, offset: bool = False, parameters: tuple[str, ...] = ()
) -> None:
    """Whether the names, kinds and types of a message's body may travel under `method`.

    Raises:
        ContentBlockedException: naming the first that may not.
    """
    if dxo.data_kind == DataKind.COLLECTION:
        for part in dict(dxo.data).values():
            if not isinstance(part, DXO):
                raise ContentBlockedException("a collection may hold only DXOs")
            check_dxo(part, method, offset, parameters)
    elif dxo.data_kind == DataKind.WEIGHTS:
        data = dict(dxo.data)
        if messages.CODED in data:
            check_coded(data.pop(messages.CODED), method, parameters)
        for name, tensor in data.items():
            check_name(name, method, offset, parameters)
            if not isinstance(tensor, torch.Tensor):
                raise ContentBlockedException(f"{name!r} is {type(tensor).__name__}, no tensor")
    elif dxo.data_kind == DataKind.METRICS:
        check_plain(dxo.data, "metrics")
    else:
        raise ContentBlockedException(f"a DXO of kind {dxo.data_kind!r} may not travel")
    check_plain(dxo.meta, "meta")


def check_name(
    name: object, method: str, offset: bool = False, parameters: tuple[str, ...] = ()
) -> None:
    """Whether a tensor of that name may travel; a control variate by its tensor's name.

    Raises:
        ContentBlockedException: if not.
    """
    plain = name.removeprefix(CONTROL) if isinstance(name, str) else ""
    if not travels(method, plain, offset, parameters):
        raise ContentBlockedException(
            f"tensor {name!r} is not among those of method {method!r} and may not travel"
        )


def check_coded(message: object, method: str, parameters: tuple[str, ...] = ()) -> None:
    """Coded bytes list the names that they hold; a receiver reads no others.

    Raises:
        ContentBlockedException: if a name may not travel, or the bytes can't be read.
    """
    if not isinstance(message, bytes):
        raise ContentBlockedException(f"coded bytes are {type(message).__name__}")
    try:
        found = names(message)
    except CodecError as error:
        raise ContentBlockedException(f"coded bytes that can't be read: {error}") from error
    for name in found:
        check_name(name, method, parameters=parameters)


def check_plain(value: Any, place: str) -> None:
    """Only numbers, strings and containers of them: nothing that could carry tensors.

    Raises:
        ContentBlockedException: naming the type of what is none.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_plain(part, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_plain(part, place)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise ContentBlockedException(f"{place} holds {type(value).__name__}, no plain value")
