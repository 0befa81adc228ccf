from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import NUMBER

from flap_nvflare.adapter.container import CodecError
from flap_nvflare.adapter.number_formats import BLOCK, FORMATS


def around(number: str, values: torch.Tensor) -> torch.Tensor:
    return FORMATS[number].decode(FORMATS[number].encode(values), values.numel())


def test_int4_by_hand() -> None:
    # Largest 7, so the scale is 1: codes are the nearest whole numbers, ties to even.
    values = torch.tensor([7.0, -7.0, 0.4, -2.5, 3.5])
    parts = FORMATS["int4"].encode(values)
    assert parts["scales"].tolist() == [1.0]
    # Codes + 8 are 15, 1, 8, 6, 12, two a byte.
    assert parts["codes"].tolist() == [0xF1, 0x86, 0xC0]
    assert around("int4", values).tolist() == [7.0, -7.0, 0.0, -2.0, 4.0]


def test_int8_by_hand() -> None:
    values = torch.tensor([127.0, -127.0, 63.4])
    assert FORMATS["int8"].encode(values)["codes"].tolist() == [127, -127, 63]
    assert around("int8", values).tolist() == [127.0, -127.0, 63.0]


def test_sign_by_hand() -> None:
    values = torch.tensor([1.0, -2.0, 3.0, 2.0])
    parts = FORMATS["sign"].encode(values)
    assert parts["codes"].tolist() == [0b10110000]
    assert around("sign", values).tolist() == [2.0, -2.0, 2.0, 2.0]


def test_fp16_keeps_what_float16_alone_would_lose() -> None:
    values = torch.tensor([1e-7, -3e-7, 2e-7])
    assert torch.allclose(around("fp16", values), values, rtol=2**-11, atol=0)
    assert not torch.allclose(values.half().float(), values, rtol=2**-11, atol=0)
    assert around("fp16", torch.tensor([2.0**20, 2.0**120])).tolist() == [0.0, 2.0**120]


def test_every_block_has_its_own_scale() -> None:
    values = torch.cat([torch.full((BLOCK,), 1e-6), torch.ones(1)])
    for number in ("int8", "int4", "sign"):
        back = around(number, values)
        assert torch.allclose(back, values, rtol=2**-7, atol=0), number


@pytest.mark.parametrize("number", sorted(FORMATS))
@given(
    st.lists(NUMBER, max_size=20),
    st.integers(0, 3 * BLOCK),
    st.integers(-149, 100),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_parts_have_their_layout_and_numbers_their_bound(
    number: str, drawn: list[float], count: int, power: int, seed: int
) -> None:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    values = torch.cat([torch.tensor(drawn), noise])
    form = FORMATS[number]
    parts = form.encode(values)
    assert {n: (p.dtype, p.numel()) for n, p in parts.items()} == form.layout(values.numel())
    back = form.decode(parts, values.numel())
    assert back.dtype == torch.float32
    assert bool(back.isfinite().all())
    assert bool(((back.double() - values.double()).abs() <= form.bound(values)).all())


@pytest.mark.parametrize(("number", "share"), [("int8", 1 / 250), ("int4", 1 / 13.8)])
def test_the_bound_is_as_small_as_stated(number: str, share: float) -> None:
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    assert bool((FORMATS[number].bound(values) <= share * values.abs().max()).all())


@pytest.mark.parametrize(
    ("number", "part", "value"),
    [
        ("fp16", "scales", torch.tensor([0.0])),
        ("fp16", "scales", torch.tensor([-1.0])),
        ("fp16", "scales", torch.tensor([torch.inf])),
        ("int8", "scales", torch.tensor([torch.nan], dtype=torch.bfloat16)),
        ("int8", "codes", torch.tensor([-128, 0, 0], dtype=torch.int8)),
        ("int4", "scales", torch.tensor([-1.0], dtype=torch.bfloat16)),
        ("int4", "codes", torch.tensor([0x0F, 0x80], dtype=torch.uint8)),
        ("int4", "codes", torch.tensor([0x88, 0x81], dtype=torch.uint8)),
        ("sign", "scales", torch.tensor([torch.inf], dtype=torch.bfloat16)),
        ("sign", "codes", torch.tensor([0b11110000], dtype=torch.uint8)),
    ],
)
def test_a_code_that_is_never_written_is_refused(
    number: str, part: str, value: torch.Tensor
) -> None:
    parts = FORMATS[number].encode(torch.ones(3))
    FORMATS[number].decode(parts, 3)
    with pytest.raises(CodecError, match=part):
        FORMATS[number].decode({**parts, part: value}, 3)
