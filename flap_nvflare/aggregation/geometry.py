"""Lengths and distances of the sites' products, all adapters of a site as one long vector.

    <M_k, M_l> = sum over adapters of trace(A_k^T B_k^T B_l A_l)
               = sum over adapters and entries of (B_k^T B_l) * (A_k A_l^T)

Both matrices on the right have the side of a rank, so no product is formed. Nothing here depends
on the basis of a factor, as lengths of the factors themselves would.

Distances from one point cost r^2 (out + in) a site. Those of all n sites from each other cost
n^2 / 2 times that, or n^2 / 2 out in once the products are formed, which costs 2 n r out in; the
cheaper way is taken, by the shapes alone (768 x 768, rank 32: products from the 39th site on).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.parallel import each

# What float32 factors and the differences below can't resolve, as a share of squared lengths.
_ROUNDING = 2.0**-46
# Numbers of products that are formed at once: 16 MB of float64.
_FORMED = 2**21
# Groups of sites whose inner products are taken at once; their pairs are taken in one order only.
_GROUPS = 8

Vectors = Sequence[Mapping[str, Tensor]]


def gram_matrix(vectors: Vectors, pairs: Sequence[Pair]) -> Tensor:
    """Inner products (n, n), float64, of the products of n adapters.

    Args:
        vectors: the tensors of each; factors of one adapter have the same rank in all of them.
        pairs: the adapters.
    """
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for gram in each(lambda pair: _gram_of(vectors, pair), pairs):
        total += gram
    return total


def distances_from(
    origin: Mapping[str, Tensor], vectors: Vectors, pairs: Sequence[Pair]
) -> list[float]:
    """|M_k - M_0| of every k, in a time linear in their number.

    Args:
        origin: the tensors of M_0; its ranks may be others.
        vectors: the tensors of each M_k.
        pairs: the adapters.
    """
    parts = each(lambda pair: _distance_parts(origin, vectors, pair), pairs)
    found = []
    for k in range(len(vectors)):
        own, mixed, first = (math.fsum(part[k][i] for part in parts) for i in range(3))
        found.append(math.sqrt(_squared(own, mixed, first)))
    return found


def squared_distance(gram: Tensor, one: int, other: int) -> float:
    """|M_one - M_other|^2; 0 where it is no more than rounding, so that equals are equal."""
    return _squared(float(gram[one, one]), float(gram[one, other]), float(gram[other, other]))


def _squared(own: float, mixed: float, other: float) -> float:
    found = own + other - 2 * mixed
    return found if found > _ROUNDING * (own + other) else 0.0


def _distance_parts(
    origin: Mapping[str, Tensor], vectors: Vectors, pair: Pair
) -> list[tuple[float, float, float]]:
    """<M_k, M_k>, <M_k, M_0> and <M_0, M_0> of one adapter, for every k."""
    first = origin[pair.b].double(), origin[pair.a].double()
    whole = _inner(first, first)
    found = []
    for one in vectors:
        own = one[pair.b].double(), one[pair.a].double()
        found.append((_inner(own, own), _inner(own, first), whole))
    return found


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """<B A, B' A'> of (B, A) and (B', A')."""
    return float(((one[0].mT @ other[0]) * (one[1] @ other[1].mT)).sum())


def _gram_of(vectors: Vectors, pair: Pair) -> Tensor:
    count, (rows, rank) = len(vectors), vectors[0][pair.b].shape
    columns = vectors[0][pair.a].shape[1]
    stacked = count / 2 * rank * rank * (rows + columns)
    formed = count / 2 * rows * columns + rank * rows * columns
    return _gram_of_products(vectors, pair) if formed < stacked else _gram_of_factors(vectors, pair)


def _gram_of_factors(vectors: Vectors, pair: Pair) -> Tensor:
    lefts = torch.stack([one[pair.b].double().mT for one in vectors])  # (n, r, out)
    rights = torch.stack([one[pair.a].double() for one in vectors])  # (n, r, in)
    count, rank = lefts.shape[:2]
    gram = torch.zeros(count, count, dtype=torch.float64)
    # One row of blocks at a time: memory for k r columns, not for their square.
    for row in range(count):
        inner = lefts[row] @ lefts[row:].flatten(0, 1).mT
        inner *= rights[row] @ rights[row:].flatten(0, 1).mT
        gram[row, row:] = inner.view(rank, count - row, rank).sum((0, 2))
    return gram + gram.triu(1).mT


def _gram_of_products(vectors: Vectors, pair: Pair) -> Tensor:
    """The same from the products, formed a few rows of all sites at a time."""
    lefts = torch.stack([one[pair.b].double() for one in vectors])  # (n, out, r)
    rights = torch.stack([one[pair.a].double() for one in vectors])  # (n, r, in)
    count, rows = lefts.shape[:2]
    gram = torch.zeros(count, count, dtype=torch.float64)
    height = max(1, _FORMED // (count * rights.shape[2]))
    width = math.ceil(count / _GROUPS)
    for top in range(0, rows, height):
        part = (lefts[:, top : top + height] @ rights).flatten(1)  # (n, rows * in)
        for first in range(0, count, width):
            group = slice(first, first + width)
            gram[group, first:] += part[group] @ part[first:].mT
    return gram.triu() + gram.triu(1).mT
