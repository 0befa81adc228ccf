"""The messages between server and sites: which fields they have and how they are read.

Every message about weights is a FLARE DXO of kind WEIGHTS whose data are the travelling
tensors by name and whose meta holds plain numbers and strings only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply

from flap_nvflare.adapter.guard import printable
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.flare.sizes import serialised_bytes as serialised_bytes
from flap_nvflare.settings import Federation
from flap_nvflare.site.reasons import SiteError, predicate

TRAIN = "train"
VALIDATE = "validate"
SUBMIT_MODEL = "submit_model"

FEDERATION = "flap_federation"  # header of a task: the federation's settings as a plain dict
RUN = "flap_run"  # header of a task: the run's name, under which a site keeps its state
TURNED = "flap_turned"  # header of a task: whether the last aggregation turned the factors
FIXED = "flap_fixed"  # header of a task: SHA-256 of the factors that every site draws alike
RECEIVED = "flap_received"  # header set by the receiver: bytes of the message as it came
FAULT = "flap_fault"  # header set by the receiver: why the message's body can't be read
CODED = "flap_coded"  # DXO data: an adapter or update as coded bytes
SPEC = "flap_spec"  # DXO meta: UpdateSpec as a plain dict
ROUND = "flap_round"  # DXO meta: round index, from 0
WEIGHT = "flap_weight"  # DXO meta: the site's weight in the aggregate
RECEIVER = "flap_receiver"  # context: the site that FLARE verified and that gets a task
SENDER = "flap_sender"  # context: the site that FLARE verified as the sender of an answer
REASON = "flap_reason"  # header of an error reply: why, as `SiteError.to_dict` gives it
REPORT = "flap_report"  # DXO meta: plain dict of a site's figures for the round


def weights_dxo(
    tensors: Mapping[str, torch.Tensor], spec: UpdateSpec, round_index: int, **meta: Any
) -> DXO:
    """A DXO with the travelling `tensors`, their spec and their round."""
    return DXO(
        DataKind.WEIGHTS,
        data=dict(tensors),
        meta={SPEC: spec.to_dict(), ROUND: round_index, **meta},
    )


def read_dxo(shareable: Shareable, kind: str) -> DXO:
    """The DXO of `shareable`.

    Raises:
        ValueError: if there is none, or one of another kind.
    """
    try:
        dxo = from_shareable(shareable)
    except Exception as error:  # FLARE raises several types for what a peer may send
        raise ValueError(f"the message holds no DXO: {type(error).__name__}") from error
    if dxo.data_kind != kind:
        raise ValueError(f"the message holds a DXO of kind {dxo.data_kind!r}, expected {kind!r}")
    return dxo


# Headers of a task that the filters of its reply need; the last of them takes them off.
_HANDED_ON = (FEDERATION, RUN, TURNED)


def hand_on(task: Shareable, reply: Shareable) -> None:
    """Copies to a reply the headers of its task that the site's own filters need."""
    for name in _HANDED_ON:
        reply.set_header(name, task.get_header(name))


class Task(NamedTuple):
    """What the filters of a reply know of its task.

    Attributes:
        federation: the settings.
        run: the run's name.
        turned: whether the last aggregation turned the factors.
        round_index: the round.
    """

    federation: Federation
    run: str
    turned: bool
    round_index: int


def handed_on(reply: Shareable) -> Task | None:
    """What `hand_on` copied; None if nothing was."""
    settings = reply.get_header(FEDERATION)
    if settings is None:
        return None
    return Task(
        federation=Federation.from_dict(settings),
        run=str(reply.get_header(RUN)),
        turned=bool(reply.get_header(TURNED, True)),
        round_index=int(read_dxo(reply, DataKind.WEIGHTS).meta[ROUND]),
    )


def take_off(reply: Shareable) -> None:
    """Removes from a reply what `hand_on` copied."""
    headers = reply.get(ReservedHeaderKey.HEADERS) or {}
    for name in _HANDED_ON:
        headers.pop(name, None)


def error_reply(code: str, error: SiteError) -> Shareable:
    """A reply without data that says why in a code and numbers."""
    reply = make_reply(code)
    reply.set_header(REASON, error.to_dict())
    return reply


def reason_of(reply: Shareable) -> str:
    """What an error reply says of its site, in the server's own words: "ran out of memory"."""
    value = reply.get_header(REASON)
    if value is None:  # an error of FLARE itself or of a filter
        return f"failed ({printable(str(reply.get_return_code()))})"
    return predicate(value)


def received_bytes(shareable: Shareable) -> int:
    """Bytes of a message as it came, before any filter of the receiver changed it."""
    known = shareable.get_header(RECEIVED)
    return known if type(known) is int and known >= 0 else serialised_bytes(shareable)
