"""The adapter-only filter passes what the method names and blocks everything else whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from flap_nvflare.flare.filters import AdapterOnlyFilter

LORA = "image_encoder.blocks.0.attn.qkv.q.lora_a"
HEAD = "mask_decoder.mask_tokens.weight"
BASE = "image_encoder.blocks.0.attn.qkv.weight"


def message(data: dict, kind: str = DataKind.WEIGHTS, **meta: object) -> Shareable:
    return DXO(kind, data=data, meta=dict(meta)).to_shareable()


def passes(shareable: Shareable, method: str = "flap") -> Shareable:
    return AdapterOnlyFilter(method).process(shareable, FLContext())


def test_adapter_and_head_pass_untouched() -> None:
    sent = message({LORA: torch.ones(2, 3), HEAD: torch.zeros(3)}, flap_weight=3.0)
    assert passes(sent) is sent


@pytest.mark.parametrize(
    ("data", "kind", "meta"),
    [
        ({LORA: torch.ones(2), BASE: torch.ones(2)}, DataKind.WEIGHTS, {}),
        ({"scan": torch.ones(2)}, DataKind.WEIGHTS, {}),
        ({LORA + ".copy": torch.ones(2)}, DataKind.WEIGHTS, {}),
        ({LORA: np.ones(2)}, DataKind.WEIGHTS, {}),
        ({7: torch.ones(2)}, DataKind.WEIGHTS, {}),
        ({LORA: torch.ones(2)}, DataKind.WEIGHTS, {"smuggled": torch.ones(2)}),
        ({LORA: torch.ones(2)}, DataKind.WEIGHT_DIFF, {}),
        ({"dice": torch.ones(2)}, DataKind.METRICS, {}),
        ({"part": DXO(DataKind.WEIGHTS, data={BASE: torch.ones(1)})}, DataKind.COLLECTION, {}),
        ({"bytes": b"scan"}, DataKind.APP_DEFINED, {}),
    ],
)
def test_anything_else_is_blocked(data: dict, kind: str, meta: dict) -> None:
    with pytest.raises(ContentBlockedException):
        passes(message(data, kind, **meta))


def test_a_field_beside_the_dxo_is_blocked() -> None:
    sent = message({LORA: torch.ones(2)})
    sent["scan"] = torch.ones(2)
    with pytest.raises(ContentBlockedException, match="scan"):
        passes(sent)


def test_a_message_without_dxo_but_with_content_is_blocked() -> None:
    with pytest.raises(ContentBlockedException):
        passes(Shareable({"DXO": {"kind": "WEIGHTS", "data": {BASE: torch.ones(1)}}}))


def test_an_error_reply_keeps_its_code_and_loses_its_data() -> None:
    sent = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    sent["scan"] = torch.ones(2)
    reply = passes(sent)
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "scan" not in reply


def test_the_method_decides() -> None:
    sent = message({HEAD: torch.zeros(3)})
    assert passes(sent, "partial_decoder") is sent
    with pytest.raises(ContentBlockedException, match="mask_tokens"):
        passes(sent, "lora")


def test_metrics_pass() -> None:
    sent = message({"last": {"test": {"dice": {"kidney": 0.9, "tumour": None}}}}, DataKind.METRICS)
    assert passes(sent) is sent
