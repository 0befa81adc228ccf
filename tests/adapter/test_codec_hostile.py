"""What a peer may send in place of a message: it is refused, or decodes to finite tensors."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from wire_cases import PIPELINES, SHA, SHAPES, normal, sha

from flap_nvflare.adapter.codec import decode, encode
from flap_nvflare.adapter.container import CodecError, Header, names, pack, unpack
from flap_nvflare.adapter.stages import Pipeline, parse

TOP = parse(["difference", "top_k=0.1", "int4"])
DEFLATED = parse(["difference", "top_k=0.1", "int4", "deflate"])
BLOBS = [encode(normal(), pipeline, sha(pipeline)) for pipeline in PIPELINES]


def is_refused_or_finite(blob: bytes, pipeline: Pipeline) -> None:
    try:
        tensors = decode(blob, SHAPES, pipeline, sha(pipeline))
    except CodecError as error:
        said = str(error)
    else:
        said = "right"
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert 0 < len(said) < 700
    with contextlib.suppress(CodecError):
        assert all(type(name) is str for name in names(blob))


@given(st.integers(0, len(BLOBS) - 1), st.data())
@settings(max_examples=400, deadline=None)
def test_spoilt_bytes(index: int, data: st.DataObject) -> None:
    spoilt = bytearray(BLOBS[index])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(spoilt) - 1))
        spoilt[place] = data.draw(st.integers(0, 255))
    is_refused_or_finite(bytes(spoilt), PIPELINES[index])


@given(st.integers(0, len(BLOBS) - 1), st.data())
@settings(max_examples=150, deadline=None)
def test_bytes_spoilt_below_zlib(index: int, data: st.DataObject) -> None:
    # Re-packed, the checksum is right again and the checks behind it are reached.
    pipeline = PIPELINES[index]
    plain = bytearray(zlib.decompress(BLOBS[index]) if pipeline.deflate else BLOBS[index])
    end = 8 + int.from_bytes(plain[:8], "little")
    start = data.draw(st.sampled_from([0, min(end, len(plain) - 1)]))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(start, len(plain) - 1))
        plain[place] = data.draw(st.integers(0, 255))
    blob = zlib.compress(bytes(plain)) if pipeline.deflate else bytes(plain)
    is_refused_or_finite(blob, pipeline)


@given(st.binary(max_size=300), st.sampled_from(PIPELINES))
@settings(max_examples=300, deadline=None)
def test_random_bytes(blob: bytes, pipeline: Pipeline) -> None:
    is_refused_or_finite(blob, pipeline)
    is_refused_or_finite(zlib.compress(blob), pipeline)
    is_refused_or_finite(len(blob).to_bytes(8, "little") + blob, pipeline)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=4), st.lists, max_leaves=6))
@settings(max_examples=150, deadline=None)
def test_any_header(value: object) -> None:
    for text in (json.dumps(value), json.dumps([value, "", []]), json.dumps([["a"], value, value])):
        is_refused_or_finite(save({"codes": torch.zeros(1)}, {"flap_message": text}), parse([]))


@pytest.mark.parametrize("pipeline", [TOP, DEFLATED])
def test_every_cut_and_every_further_byte_is_refused(pipeline: Pipeline) -> None:
    blob = encode(normal(), pipeline, SHA)
    for wrong in [blob[:n] for n in range(len(blob))] + [blob + b"\0", blob + blob, b"\0" + blob]:
        with pytest.raises(CodecError):
            decode(wrong, SHAPES, pipeline, SHA)


def test_a_bomb_is_refused_without_memory() -> None:
    plain = encode(normal(), TOP, SHA)
    bombs = [zlib.compress(plain + bytes(200_000_000), 9)]
    bombs.append(zlib.compress(plain + bytes(4_000_000), 9))  # short enough to be inflated
    length = 200_000_000
    bombs.append(zlib.compress(length.to_bytes(8, "little") + b"{" + b" " * length, 9))
    for bomb in bombs:
        tracemalloc.start()
        with pytest.raises(CodecError, match=r"at most 5781 are expected|more than the 5781 bytes"):
            decode(bomb, SHAPES, DEFLATED, SHA)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000
    with pytest.raises(CodecError, match="header would have"):
        names(bombs[-1])


def test_a_deep_header_is_refused() -> None:
    deep = b'{"__metadata__":' + b"[" * 100_000
    with pytest.raises(CodecError):
        names(len(deep).to_bytes(8, "little") + deep)


Edit = Callable[[dict[str, torch.Tensor], list[str]], object]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda parts, sent: sent.append("zzz"), "unexpected name 'zzz'"),
        (lambda parts, sent: sent.insert(0, "q.lora_b"), "not in order"),
        (lambda parts, sent: sent.append("q.lora_b"), "one is there twice"),
        (lambda parts, sent: sent.remove("q.lora_a"), "beyond the 120 numbers"),
        (lambda parts, sent: parts.update(more=torch.zeros(1)), "parts are"),
        (lambda parts, sent: parts.pop("scales"), "parts are"),
        (lambda parts, sent: parts.pop("positions"), "no positions"),
        (lambda parts, sent: parts.update(codes=parts["codes"][:-1].clone()), "parts are"),
        (lambda parts, sent: parts.update(codes=parts["codes"].view(torch.int8)), "parts are"),
        (lambda parts, sent: parts.update(scales=parts["scales"].half()), "parts are"),
        (lambda parts, sent: parts["scales"].fill_(torch.nan), "finite"),
        (lambda parts, sent: parts["scales"].fill_(torch.inf), "finite"),
        (lambda parts, sent: parts["scales"].fill_(3e38), "number that is not finite"),
        (lambda parts, sent: parts["positions"].fill_(255), "last gap has no end"),
        (lambda parts, sent: parts.update(codes=torch.zeros(2, 2)), "of another kind"),
        (lambda parts, sent: parts.update(codes=torch.zeros(2, dtype=torch.int64)), "another kind"),
    ],
)
def test_a_right_message_but_for_one_thing(edit: Edit, reason: str) -> None:
    blob = encode(normal(), TOP, SHA)
    parts, header = unpack(blob, False, len(blob))
    parts = {name: part.clone() for name, part in parts.items()}
    sent = list(header.names)
    assert pack(parts, Header(tuple(sent), SHA, TOP.texts), False) == blob
    # The header's own check would stop a list that is not in order: it is written by hand.
    edit(parts, sent)
    text = json.dumps([sent, SHA, list(TOP.texts)])
    with pytest.raises(CodecError, match=reason):
        decode(save(parts, {"flap_message": text}), SHAPES, TOP, SHA)


def test_another_list_of_stages_or_reference_is_refused() -> None:
    blob = encode(normal(), TOP, SHA)
    with pytest.raises(CodecError, match="both ends must have the same list"):
        decode(blob, SHAPES, parse(["difference", "top_k=0.2", "int4"]), SHA)
    with pytest.raises(CodecError, match="the message is not deflated"):
        decode(blob, SHAPES, DEFLATED, SHA)
    with pytest.raises(
        CodecError, match="difference to abababababab, expected one to cdcdcdcdcdcd"
    ):
        decode(blob, SHAPES, TOP, "cd" * 32)


def test_more_numbers_than_the_share_are_refused() -> None:
    more = parse(["difference", "top_k=0.5", "int4"])
    parts, header = unpack(encode(normal(), more, SHA), False, 10**6)
    blob = pack(parts, Header(header.names, SHA, TOP.texts), False)
    with pytest.raises(CodecError, match="at most 27 may be"):
        decode(blob, SHAPES, TOP, SHA)


def test_a_message_without_a_name_is_refused_unless_it_is_a_difference() -> None:
    tensors = normal()
    del tensors["head.scale"]
    with pytest.raises(CodecError, match=r"lacks 'head\.scale'"):
        decode(encode(tensors, parse([])), SHAPES, parse([]))


@pytest.mark.parametrize("blob", [None, "text", 3, bytearray(b"x"), [b"x"]])
def test_no_bytes_are_refused(blob: object) -> None:
    for pipeline in (TOP, DEFLATED):
        with pytest.raises(CodecError, match="a message is bytes"):
            decode(blob, SHAPES, pipeline, SHA)  # type: ignore[arg-type]
