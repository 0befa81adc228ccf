"""Small updates, every sensible list of stages, and what hypothesis draws of both."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st

from flap_nvflare.adapter.stages import NUMBERS, Pipeline, parse

Tensors = dict[str, torch.Tensor]
SHAPES = {"head.none": (0, 2), "head.scale": (), "q.lora_a": (3, 50), "q.lora_b": (40, 3)}
SHA = "ab" * 32


def _lists() -> list[list[str]]:
    found = []
    ways = itertools.product(
        (False, True), (None, "top_k=0.1", "top_k=0.6"), (None, *NUMBERS), (False, True)
    )
    for difference, share, number, deflate in ways:
        if share is None or difference:
            stages = ["difference" if difference else None, share, number]
            found.append([s for s in [*stages, "deflate" if deflate else None] if s])
    return found


LISTS = _lists()
PIPELINES = [parse(texts) for texts in LISTS]


def sha(pipeline: Pipeline) -> str:
    """The reference that a message of this pipeline names."""
    return SHA if pipeline.difference else ""


def normal(seed: int = 0, size: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


# Magnitudes from float32's smallest to the largest that is coded, ties and zeros among them.
NUMBER = st.one_of(
    st.floats(-(2.0**126), 2.0**126, width=32),
    st.floats(-(2.0**-10), 2.0**-10, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, 2.0**126, 65504.0]),
)


@st.composite
def updates(draw: st.DrawFn) -> Tensors:
    """Tensors of `SHAPES`: random ones of any size with some drawn numbers put in, or zeros."""
    size = 2.0 ** draw(st.integers(-140, 100))
    tensors = normal(draw(st.integers(0, 99)), size)
    for name in draw(st.sets(st.sampled_from(sorted(SHAPES)))):
        tensors[name] = torch.zeros(SHAPES[name])
    for value in draw(st.lists(NUMBER, max_size=8)):
        flat = tensors[draw(st.sampled_from(["head.scale", "q.lora_a", "q.lora_b"]))].view(-1)
        flat[draw(st.integers(0, flat.numel() - 1))] = value
    return tensors
