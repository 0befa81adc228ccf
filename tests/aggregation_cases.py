"""Updates for the tests of aggregation, and the same figures computed from dense matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    """Whether everything that two aggregates hold is the same, bit for bit."""
    kinds = ("tensors", "offset", "memory")
    return (one.error, one.turned, one.excluded) == (
        other.error,
        other.turned,
        other.excluded,
    ) and all(_equal(getattr(one, kind), getattr(other, kind)) for kind in kinds)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        and tensor.numpy().tobytes() == other[name].numpy().tobytes()
        for name, tensor in one.items()
    )


def offset_of(offset: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense change of the base by stem, zero where there is none; `like` gives the shapes."""
    dense = {stem: torch.zeros_like(product) for stem, product in products(dict(like)).items()}
    for stem in dense:
        if f"{stem}.offset_b" in offset:
            b, a = offset[f"{stem}.offset_b"], offset[f"{stem}.offset_a"]
            dense[stem] = b.double() @ a.double()
    return dense


def held(result: Aggregate, old: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What the aggregate makes of the mean products: B A and what it adds to the base."""
    before = offset_of(old or {}, result.tensors)
    after = offset_of(result.offset, result.tensors)
    found = products(result.tensors)
    return {stem: found[stem] + after[stem] - before[stem] for stem in found}


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Frobenius norm of the difference of all matrices together."""
    return whole({stem: one[stem] - other[stem] for stem in one})


def of_ranks(contributions: Sequence[Contribution], ranks: Sequence[int]) -> list[Contribution]:
    """The same sites with the first rows of A and columns of B; ranks are taken in turn."""
    found = []
    for index, one in enumerate(contributions):
        tensors = dict(one.tensors)
        for pair in pairs(tensors):
            rank = ranks[index % len(ranks)]
            tensors[pair.a] = tensors[pair.a][:rank].clone()
            tensors[pair.b] = tensors[pair.b][:, :rank].clone()
        found.append(Contribution(one.site, one.weight, tensors))
    return found


@st.composite
def unequal_federations(draw: st.DrawFn) -> list[Contribution]:
    """Federations whose sites cut their adapters to ranks of their own."""
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return of_ranks(draw(federations()), ranks)
