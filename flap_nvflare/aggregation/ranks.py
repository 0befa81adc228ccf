"""Adapters whose ranks differ between sites.

A site of rank q holds the first q rows of A and columns of B of the global adapter. Where a rule
needs factors of one size, those of a smaller rank are padded with zeros, which changes no
product.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import LORA_A, LORA_B
from flap_nvflare.aggregation.products import Factors
from flap_nvflare.aggregation.rule import AggregationError, Contribution, Round


def padded(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The matrix with zeros added at its end up to `shape`; itself if it has that shape."""
    if matrix.shape == torch.Size(shape):
        return matrix
    whole = matrix.new_zeros(tuple(shape))
    whole[tuple(slice(size) for size in matrix.shape)] = matrix
    return whole


def from_means(stack: Sequence[Factors], b: Tensor, a: Tensor) -> list[Factors]:
    """Every site's B_k - B and A_k - A in float64, factors of smaller rank padded first."""
    return [
        one._replace(b=padded(one.b.double(), b.shape) - b, a=padded(one.a.double(), a.shape) - a)
        for one in stack
    ]


def check_ranks(contribution: Contribution, round: Round) -> None:
    """Refuses a rank above the federation's, to which a mean of factors can't be cut.

    Raises:
        AggregationError: if a factor has a larger rank.
    """
    for name, tensor in sorted(contribution.tensors.items()):
        if round.rank and tensor.dim() == 2 and name.endswith((LORA_A, LORA_B)):
            rank = tensor.shape[0 if name.endswith(LORA_A) else 1]
            if rank > round.rank:
                raise AggregationError(
                    f"tensor {name!r} of site {contribution.site!r} has rank {rank}; expected at "
                    f"most the federation's rank, {round.rank}: raise it or lower the site's",
                    name,
                )


def grown(b: Tensor, a: Tensor, name: str, round: Round) -> tuple[Tensor, Tensor]:
    """Means of factors at the federation's rank.

    Rows of A that no site has this round are drawn, as in a fresh adapter: with zeros in both
    factors they would have no gradient for ever. B is zero there, so the product stays.

    Args:
        b: (out, r).
        a: (r, in).
        name: name of A.
        round: its rank is that wanted; 0 for r.
    """
    rank, columns = a.shape
    if not round.rank > rank:
        return b, a
    fresh = drawn(name, (round.rank, columns), round).to(a.dtype)
    return padded(b, (b.shape[0], round.rank)), torch.cat([a, fresh[rank:]])


def drawn(name: str, shape: tuple[int, int], round: Round) -> Tensor:
    """A fresh A (r, in) in float32: normal with std 1 / sqrt(in), by seed, round and name."""
    digest = hashlib.sha256(f"{round.seed}/{round.index}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator).div_(math.sqrt(shape[1]))
