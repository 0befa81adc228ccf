from __future__ import annotations

import json
import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import LISTS, PIPELINES, SHA, SHAPES, Tensors, normal, sha, updates

from flap_nvflare.adapter.codec import bound, decode, encode
from flap_nvflare.adapter.container import CodecError, names, read_header
from flap_nvflare.adapter.stages import Pipeline, parse

TOP = parse(["difference", "top_k=0.1", "int4", "deflate"])


def around(tensors: Tensors, pipeline: Pipeline) -> Tensors:
    return decode(encode(tensors, pipeline, sha(pipeline)), SHAPES, pipeline, sha(pipeline))


@pytest.mark.parametrize("pipeline", PIPELINES, ids=map(",".join, LISTS))
@given(tensors=updates())
@settings(max_examples=30, deadline=None)
def test_every_number_comes_back_within_its_bound(pipeline: Pipeline, tensors: Tensors) -> None:
    back, bounds = around(tensors, pipeline), bound(tensors, pipeline)
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == SHAPES
    for name, tensor in back.items():
        assert tensor.dtype == torch.float32
        error = (tensor.double() - tensors[name].double()).abs()
        assert bool((error <= bounds[name]).all()), name


@given(updates(), st.sampled_from(PIPELINES))
@settings(max_examples=60, deadline=None)
def test_equal_updates_give_equal_bytes(tensors: Tensors, pipeline: Pipeline) -> None:
    turned = dict(reversed(tensors.items()))
    blob = encode(tensors, pipeline, sha(pipeline))
    assert encode(turned, pipeline, sha(pipeline)) == blob
    assert encode({n: t.clone() for n, t in tensors.items()}, pipeline, sha(pipeline)) == blob


@pytest.mark.parametrize("texts", [[], ["deflate"], ["difference"], ["difference", "deflate"]])
def test_without_a_lossy_stage_nothing_is_lost(texts: list[str]) -> None:
    tensors = normal()
    back = around(tensors, parse(texts))
    assert all(torch.equal(back[name], tensors[name]) for name in SHAPES)


def test_top_k_keeps_the_largest_of_the_whole_update() -> None:
    tensors = {"a": torch.tensor([1.0, -9.0, 0.5]), "b": torch.tensor([[8.0, 7.0]])}
    pipeline = parse(["difference", "top_k=0.4"])
    blob = encode(tensors, pipeline, SHA)
    back = decode(blob, {"a": (3,), "b": (1, 2)}, pipeline, SHA)
    assert back["a"].tolist() == [0.0, -9.0, 0.0]
    assert back["b"].tolist() == [[8.0, 0.0]]
    limits = bound(tensors, pipeline)
    assert limits["a"].tolist() == [1.0, 0.0, 0.5]
    assert limits["b"].tolist() == [[0.0, 7.0]]


def test_a_tensor_without_change_is_absent_and_zero() -> None:
    tensors = normal()
    tensors["q.lora_a"].zero_()
    for texts in (["difference"], ["difference", "top_k=0.6", "int8"]):
        pipeline = parse(texts)
        blob = encode(tensors, pipeline, sha(pipeline))
        assert names(blob) == ["head.scale", "q.lora_b"]
        assert not decode(blob, SHAPES, pipeline, sha(pipeline))["q.lora_a"].any()
    whole = encode(tensors, parse([]))
    assert names(whole) == sorted(SHAPES)


def test_an_update_of_zeros_is_a_message() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for pipeline in PIPELINES:
        assert all(not tensor.any() for tensor in around(tensors, pipeline).values())


@pytest.mark.parametrize("texts", [["int4"], ["int4", "deflate"]])
def test_a_gate_reads_names_and_stages_alone(texts: list[str]) -> None:
    blob = encode(normal(), parse(["difference", *texts]), "cd" * 32)
    assert names(blob) == ["head.scale", "q.lora_a", "q.lora_b"]
    header = read_header(blob)
    assert (header.reference, header.stages) == ("cd" * 32, ("difference", *texts))


def test_any_zlib_inflates_a_message_to_a_safetensors_file() -> None:
    tensors = normal()
    blob = encode(tensors, TOP, sha(TOP))
    plain = encode(tensors, parse(list(TOP.texts[:-1])), sha(TOP))
    inflated = zlib.decompress(blob)
    # But for the stage's own name in the header, the same file.
    length = int.from_bytes(inflated[:8], "little")
    parts = {"codes", "positions", "scales"}
    assert set(json.loads(inflated[8 : 8 + length])) == {"__metadata__", *parts}
    assert plain.endswith(inflated[8 + length :])


@pytest.mark.parametrize(
    ("texts", "most"),
    [
        (["int8"], 8.2), (["int4"], 4.2), (["sign"], 1.2),
        (["difference", "top_k=0.1", "int4", "deflate"], 0.81),
        (["difference", "top_k=0.15", "sign", "deflate"], 0.82),
        (["difference", "top_k=0.05", "sign", "deflate"], 0.37),
    ],
)  # fmt: skip
def test_bits_of_a_number(texts: list[str], most: float) -> None:
    tensors = {"w": torch.randn(200_000, generator=torch.Generator().manual_seed(0))}
    pipeline = parse(texts)
    assert 8 * len(encode(tensors, pipeline, sha(pipeline))) / 200_000 < most


def test_sixty_names_take_little_of_a_deflated_message() -> None:
    few = {"w": torch.randn(6000, generator=torch.Generator().manual_seed(0))}
    parts = few["w"].view(60, 100)
    many = {f"decoder.layers.{i:02}.attn.q.lora_a": parts[i] for i in range(60)}
    sizes = [len(encode(tensors, parse(["sign", "deflate"]))) for tensors in (few, many)]
    assert 0 < sizes[1] - sizes[0] < 60 * 8


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(2, dtype=torch.float64), "only float32"),
        (torch.tensor([1.0, math.nan]), "not finite"),
        (torch.tensor([-math.inf, 1.0]), "not finite"),
        (torch.tensor([3e38, 1.0]), "above"),
    ],
)
def test_numbers_that_cannot_be_coded_are_refused(tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(CodecError, match=f"'w'.*{reason}"):
        encode({"w": tensor}, parse(["int8"]))


def test_a_difference_names_its_reference() -> None:
    with pytest.raises(CodecError, match="names its reference"):
        encode(normal(), TOP)
    with pytest.raises(CodecError, match="names its reference"):
        encode(normal(), parse(["int4"]), "ab" * 32)
