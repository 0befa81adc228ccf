"""What every rule takes and gives, and the arithmetic that rules share.

Sums run in float64 over contributions sorted by site, so a result does not depend on the
order of arrival, not even in its last bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from flap_nvflare.adapter.factors import Pair, pairs


@dataclass(frozen=True)
class Contribution:
    """One site's update.

    Attributes:
        site: the site's name, which orders the sums.
        weight: positive; only ratios matter.
        tensors: by name; factors A (r, in) and B (out, r), everything else of any shape.
    """

    site: str
    weight: float
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Aggregate:
    """One update made of many.

    Attributes:
        tensors: names, shapes and dtypes of the contributions.
        error: relative Frobenius error of all adapters' products together against the exact
            weighted mean of the sites' products: sqrt(sum |B A - M|^2 / sum |M|^2).
        turned: whether the rule gave the factors another basis, so that moments kept for
            the old one mean nothing.
    """

    tensors: Mapping[str, torch.Tensor]
    error: float
    turned: bool


Rule = Callable[[Sequence[Contribution]], Aggregate]


@dataclass(frozen=True)
class Stack:
    """All adapters of one shape: the weighted mean product M = left @ right, never formed.

    Attributes:
        pairs: the adapters.
        left: (n, out, k r) float64; site k's B times its weight.
        right: (n, k r, in) float64; the sites' A below each other.
        rank: r.
    """

    pairs: tuple[Pair, ...]
    left: torch.Tensor
    right: torch.Tensor
    rank: int


def prepared(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Sorted by site, weights summing to 1.

    Raises:
        ValueError: if there are none, a site comes twice, a weight is not positive, or names or
            shapes differ between sites.
    """
    if not contributions:
        raise ValueError("there is no update to aggregate")
    ordered = sorted(contributions, key=lambda one: one.site)
    total = sum(one.weight for one in ordered)
    shapes = {name: tensor.shape for name, tensor in ordered[0].tensors.items()}
    for before, one in zip([None, *ordered], ordered, strict=False):
        if before is not None and before.site == one.site:
            raise ValueError(f"site {one.site!r} comes twice")
        if not one.weight > 0:
            raise ValueError(f"site {one.site!r} has weight {one.weight!r}; expected above 0")
        if {name: tensor.shape for name, tensor in one.tensors.items()} != shapes:
            raise ValueError(
                f"site {one.site!r} has other names, shapes or ranks than {ordered[0].site!r}; "
                "this rule needs the same at all sites"
            )
    return [Contribution(one.site, one.weight / total, one.tensors) for one in ordered]


def weighted_mean(contributions: Sequence[Contribution], name: str) -> torch.Tensor:
    """The tensor `name`, summed in float64; in the contributions' dtype."""
    dtype = contributions[0].tensors[name].dtype
    total = sum(one.weight * one.tensors[name].double() for one in contributions)
    return torch.as_tensor(total).to(dtype)


def stacks(contributions: Sequence[Contribution]) -> Iterator[Stack]:
    """The adapters grouped by shape, so that decompositions run in batches."""
    tensors = contributions[0].tensors
    groups: dict[tuple[torch.Size, torch.Size], list[Pair]] = defaultdict(list)
    for pair in pairs(tensors):
        groups[tensors[pair.a].shape, tensors[pair.b].shape].append(pair)
    for (shape_a, shape_b), group in sorted(groups.items()):
        if shape_a[0] != shape_b[1]:
            raise ValueError(f"adapter {group[0].stem!r}: A {shape_a} and B {shape_b} do not fit")
        left = [
            torch.cat([one.weight * one.tensors[pair.b].double() for one in contributions], dim=1)
            for pair in group
        ]
        right = [
            torch.cat([one.tensors[pair.a].double() for one in contributions]) for pair in group
        ]
        yield Stack(tuple(group), torch.stack(left), torch.stack(right), shape_a[0])


def plain_names(contributions: Sequence[Contribution]) -> list[str]:
    """Names of the tensors that are no factor of an adapter."""
    names = contributions[0].tensors
    factors = {name for pair in pairs(names) for name in (pair.a, pair.b)}
    return sorted(set(names) - factors)
