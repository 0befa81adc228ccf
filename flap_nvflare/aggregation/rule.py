"""What a rule of aggregation takes and gives, and the steps that all rules share.

A rule is a pure function: updates and weights in, one update and its error out. All sums are
taken in float64 and in the order of the sites' names, so the result is the same, bit for
bit, in whatever order the updates arrived.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair, pairs


class AggregationError(ValueError):
    """The updates can't be made one; the message names the site or tensor and the mend."""


@dataclass(frozen=True)
class Contribution:
    """One site's update.

    Attributes:
        site: the site's name.
        weight: a positive number; only its share of the sum of all weights matters.
        tensors: the update's tensors by name.
    """

    site: str
    weight: float
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Aggregate:
    """What a rule makes of the updates.

    Attributes:
        tensors: one update, sorted by name, in the dtype of the contributions.
        error: relative Frobenius error of the adapters' products B A against their exact
            weighted mean, over all pairs together; 0 if there are no pairs. Where the exact
            mean is zero: 0 if the rule's products are zero as well, else 1.
        turned: whether the factors are in another basis than the sites' were, so that an
            optimiser's moments of them point nowhere and must be reset.
    """

    tensors: dict[str, Tensor]
    error: float
    turned: bool


Rule = Callable[[Sequence[Contribution]], Aggregate]


def prepared(contributions: Sequence[Contribution]) -> tuple[Contribution, ...]:
    """The contributions sorted by site, with weights that add up to 1.

    Raises:
        AggregationError: if there are none, a site comes twice, a weight is not a positive
            number, the tensors' names, shapes or dtypes differ between sites, or a value is
            not finite.
    """
    if not contributions:
        raise AggregationError("no update to aggregate; at least one site must contribute")
    ordered = sorted(contributions, key=lambda one: one.site)
    for before, after in itertools.pairwise(ordered):
        if before.site == after.site:
            raise AggregationError(f"site {after.site!r} contributes twice; keep one update a site")
    for one in ordered:
        if not (math.isfinite(one.weight) and one.weight > 0):
            raise AggregationError(
                f"weight {one.weight!r} of site {one.site!r}; expected a positive number"
            )
        _check_alike(ordered[0], one)
    # Shares of the largest first: a sum of huge weights can't overflow.
    largest = max(one.weight for one in ordered)
    shares = [one.weight / largest for one in ordered]
    total = math.fsum(shares)
    return tuple(
        replace(one, weight=share / total) for one, share in zip(ordered, shares, strict=True)
    )


def _check_alike(first: Contribution, other: Contribution) -> None:
    for name in sorted(set(first.tensors) ^ set(other.tensors)):
        without = other.site if name in first.tensors else first.site
        raise AggregationError(f"tensor {name!r} is missing at site {without!r}")
    for name, tensor in first.tensors.items():
        ours, theirs = _kind(tensor), _kind(other.tensors[name])
        if ours != theirs:
            raise AggregationError(
                f"tensor {name!r} is {theirs} at site {other.site!r}, {ours} at {first.site!r}"
            )
        if not tensor.is_floating_point():
            raise AggregationError(f"tensor {name!r} is {tensor.dtype}; only floats have a mean")
        if not bool(torch.isfinite(other.tensors[name]).all()):
            raise AggregationError(
                f"tensor {name!r} of site {other.site!r} holds nan or infinity; refuse the update"
            )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def mean_tensor(contributions: Sequence[Contribution], name: str) -> Tensor:
    """Weighted mean of one tensor in float64; the weights must add up to 1."""
    total = torch.zeros_like(contributions[0].tensors[name], dtype=torch.float64)
    for one in contributions:
        total.add_(one.tensors[name].detach().double(), alpha=one.weight)
    return total


def pairs_of(contributions: Sequence[Contribution]) -> tuple[Pair, ...]:
    """The adapters that travel, sorted by stem, each a matrix pair of one rank.

    Raises:
        AggregationError: if a factor has no partner, is no matrix, or its rank is another
            than its partner's.
    """
    tensors = contributions[0].tensors
    try:
        found = pairs(tensors)
    except ValueError as error:
        raise AggregationError(f"{error}; send both factors") from error
    for pair in found:
        a, b = tuple(tensors[pair.a].shape), tuple(tensors[pair.b].shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            raise AggregationError(
                f"adapter {pair.stem!r}: A is {a}, B is {b}; expected (rank, in) and (out, rank)"
            )
    return found


def relative_error(error_squares: float, exact_squares: float) -> float:
    """sqrt(error / exact) of two sums of squares; see `Aggregate.error` for a zero mean."""
    if exact_squares <= 0:
        return 1.0 if error_squares > 0 else 0.0
    return math.sqrt(max(error_squares, 0.0) / exact_squares)
