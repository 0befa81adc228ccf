"""The messages between server and sites: which fields they have and how they are read.

Every message about weights is a FLARE DXO of kind WEIGHTS whose data are the travelling
tensors by name and whose meta holds plain numbers and strings only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils import fobs

from flap_nvflare.adapter.update import UpdateSpec

TRAIN = "train"
VALIDATE = "validate"
SUBMIT_MODEL = "submit_model"

FEDERATION = "flap_federation"  # header of a task: the federation's settings as a plain dict
RUN = "flap_run"  # header of a task: the run's name, under which a site keeps its state
TURNED = "flap_turned"  # header of a task: whether the last aggregation turned the factors
SPEC = "flap_spec"  # DXO meta: UpdateSpec as a plain dict
ROUND = "flap_round"  # DXO meta: round index, from 0
WEIGHT = "flap_weight"  # DXO meta: the site's weight in the aggregate
SENDER = "flap_sender"  # context: the site that FLARE verified as the sender of an answer
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


def serialised_bytes(shareable: Shareable) -> int:
    """Bytes of the message as FLARE serialises it for the wire."""
    return len(fobs.dumps(shareable))
