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

from flap_nvflare.adapter.codec import encode
from flap_nvflare.adapter.stages import parse
from flap_nvflare.flare import messages
from flap_nvflare.flare.filters import AdapterOnlyFilter

LORA = "image_encoder.blocks.0.attn.qkv.q.lora_a"
HEAD = "mask_decoder.mask_tokens.weight"
BASE = "image_encoder.blocks.0.attn.qkv.weight"
OFFSET = "image_encoder.blocks.0.attn.qkv.q.offset_a"


def message(data: dict, kind: str = DataKind.WEIGHTS, **meta: object) -> Shareable:
    return DXO(kind, data=data, meta=dict(meta)).to_shareable()


def passes(shareable: Shareable, method: str = "flap", offset: bool = False) -> Shareable:
    return AdapterOnlyFilter(method, offset).process(shareable, FLContext())


def coded(*names: str, deflate: bool = True) -> bytes:
    """Coded bytes that hold a number of each of the tensors."""
    stages = parse(["int8", "deflate"] if deflate else ["int8"])
    return encode({name: torch.ones(2) for name in names}, stages)


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


@pytest.mark.parametrize("deflate", [True, False])
def test_coded_bytes_are_judged_by_the_names_in_them(deflate: bool) -> None:
    sent = message({messages.CODED: coded(LORA, HEAD, deflate=deflate)})
    assert passes(sent) is sent
    with pytest.raises(ContentBlockedException, match="mask_tokens"):
        passes(sent, "lora")
    for hidden in (BASE, OFFSET, "scan", f"control/{BASE}"):
        smuggled = message({messages.CODED: coded(LORA, hidden, deflate=deflate)})
        for offset in (False, True):
            with pytest.raises(ContentBlockedException, match="may not travel"):
                passes(smuggled, offset=offset)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"scan",
        coded(LORA)[:20],
        b"\xff" * 64,
        bytearray(coded(LORA)),
        torch.ones(2),
        "scan",
        None,
    ],
    ids=["empty", "no message", "cut off", "noise", "other bytes", "tensor", "text", "nothing"],
)
def test_coded_bytes_that_can_not_be_read_are_blocked(blob: object) -> None:
    with pytest.raises(ContentBlockedException, match="coded bytes"):
        passes(message({messages.CODED: blob}))


def test_coded_bytes_beside_a_forbidden_tensor_are_blocked() -> None:
    with pytest.raises(ContentBlockedException, match=r"qkv\.weight"):
        passes(message({messages.CODED: coded(LORA), BASE: torch.ones(2)}))


def test_coded_bytes_under_another_name_are_blocked() -> None:
    with pytest.raises(ContentBlockedException):
        passes(message({"flap_coded_2": coded(LORA)}))


def test_a_change_of_the_base_comes_in_and_never_leaves() -> None:
    sent = message({LORA: torch.ones(2, 3), OFFSET: torch.ones(2, 3)})
    assert passes(sent, offset=True) is sent
    with pytest.raises(ContentBlockedException, match="offset_a"):
        passes(sent)
    for name in (OFFSET + ".copy", "image_encoder.neck.0.offset_a", OFFSET + "/scan"):
        with pytest.raises(ContentBlockedException):
            passes(message({name: torch.ones(2)}), offset=True)
    # A method without adapters has nothing that a base could be changed by.
    with pytest.raises(ContentBlockedException, match="offset_a"):
        passes(message({OFFSET: torch.ones(2)}), "partial_decoder", offset=True)


def test_a_control_variate_has_the_name_of_a_tensor_that_travels() -> None:
    sent = message({LORA: torch.ones(2, 3), f"control/{LORA}": torch.ones(2, 3)})
    assert passes(sent) is sent
    for name in (f"control/{BASE}", "control/", f"control/control/{LORA}", f"CONTROL/{LORA}"):
        with pytest.raises(ContentBlockedException, match="may not travel"):
            passes(message({name: torch.ones(2)}))
    with pytest.raises(ContentBlockedException, match="no tensor"):
        passes(message({f"control/{LORA}": b"scan"}))
