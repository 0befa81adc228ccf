"""Updates for the tests of aggregation, and the same figures computed from dense matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from flap_nvflare.adapter.factors import pairs
from flap_nvflare.aggregation import Aggregate, Contribution


def site(name: str, weight: float, **tensors: list) -> Contribution:
    """A contribution from nested lists; `a` and `b` are the factors of the adapter `q`."""
    names = {"a": "q.lora_a", "b": "q.lora_b"}
    return Contribution(
        name, weight, {names.get(key, key): torch.tensor(value) for key, value in tensors.items()}
    )


def random_sites(
    sites: int,
    shapes: Sequence[tuple[int, int, int]],
    seed: int = 0,
    drift: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> list[Contribution]:
    """Adapters of (out, in, rank) that drifted from a common start, and a head of 5 numbers."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, tuple[int, ...]] = {"head": (5,)}
    for index, (rows, columns, rank) in enumerate(shapes):
        sizes[f"l{index}.lora_a"] = (rank, columns)
        sizes[f"l{index}.lora_b"] = (rows, rank)
    start = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    weights = torch.rand(sites, generator=generator) + 0.1
    return [
        Contribution(
            f"site-{index}",
            float(weights[index]),
            {
                name: (tensor + drift * torch.randn(tensor.shape, generator=generator)).to(dtype)
                for name, tensor in start.items()
            },
        )
        for index in range(sites)
    ]


@st.composite
def federations(draw: st.DrawFn) -> list[Contribution]:
    """One to five sites with one to three adapters of any small shape, wide, tall or square.

    The shorter sides make dense products of two sites' adapters, the longer ones stacks.
    """
    side = st.one_of(st.integers(1, 9), st.integers(20, 40))
    shape = st.tuples(side, side, st.integers(1, 4))
    return random_sites(
        draw(st.integers(1, 5)),
        draw(st.lists(shape, min_size=1, max_size=3)),
        seed=draw(st.integers(0, 2**31)),
        drift=draw(st.sampled_from([0.0, 0.01, 0.5, 3.0])),
    )


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        pair.stem: tensors[pair.b].double() @ tensors[pair.a].double() for pair in pairs(tensors)
    }


def exact_products(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Weighted mean of the products, dense."""
    total = sum(one.weight for one in contributions)
    exact: dict[str, Tensor] = {}
    for one in contributions:
        for stem, product in products(dict(one.tensors)).items():
            exact[stem] = exact.get(stem, 0) + one.weight / total * product
    return exact


def dense_error(result: Aggregate, contributions: Sequence[Contribution]) -> float:
    """Relative Frobenius error of the products, dense; the exact mean must not be zero."""
    exact, found = exact_products(contributions), products(result.tensors)
    lost = sum(float((found[stem] - exact[stem]).square().sum()) for stem in exact)
    return (lost / whole(exact) ** 2) ** 0.5


def whole(matrices: dict[str, Tensor]) -> float:
    """Frobenius norm of all matrices together."""
    return sum(float(matrix.square().sum()) for matrix in matrices.values()) ** 0.5


def equal_bits(one: Aggregate, other: Aggregate) -> bool:
    return (
        list(one.tensors) == list(other.tensors)
        and all(
            tensor.numpy().tobytes() == other.tensors[name].numpy().tobytes()
            for name, tensor in one.tensors.items()
        )
        and (one.error, one.turned) == (other.error, other.turned)
    )
