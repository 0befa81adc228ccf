"""What a rule of aggregation takes and gives, and the books that every rule keeps.

A rule makes an accumulator: updates go in one by one as they arrive, one update and its error
come out. The result is the same, bit for bit, in whatever order the updates arrived.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import LORA_A, LORA_B, Pair, pairs
from flap_nvflare.aggregation.exact_sum import LIMIT, MOST

# Below, the shares of weights and values would come near the smallest floats.
_LEAST_WEIGHT = 1e-270
# The square of a product of two factors of this norm is still a float64.
_MOST_NORM = 1e75


class AggregationError(ValueError):
    """The updates can't be made one; the message names the site or tensor and the mend.

    Attributes:
        key: the tensor at fault; empty if the fault is another.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


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
class Card:
    """What a rule is, for those who choose one and for those who check the choice.

    Attributes:
        paper: name and arXiv number.
        formula: what it makes of the updates, in a line.
        exact: `yes` if the mean of the sites' products B A is kept whole, else what is lost.
        trains: which factors train and travel: `ab` (both), `b` (A stays as drawn), `alternate`
            (B in even rounds, A in odd ones) or `core` (an r x r matrix between frozen factors).
        private: the factors that train but stay at their site: `` or `b`.
        offset: whether it changes the sites' frozen base, by factors sent down besides the adapter.
        linear: whether its result is linear in what the sites send, so that it may be encrypted
            or masked.
        unequal_ranks: whether sites may have different ranks.
        streaming: whether the server's memory does not grow with the number of sites.
        robust: whether it bounds what hostile sites can do.
    """

    paper: str
    formula: str
    exact: str
    trains: str = "ab"
    private: str = ""
    offset: bool = False
    linear: bool = False
    unequal_ranks: bool = False
    streaming: bool = True
    robust: bool = False

    @property
    def pairs(self) -> bool:
        """Whether both factors of every adapter arrive, so that their products are known."""
        return self.trains == "ab" and not self.private


@dataclass(frozen=True)
class Round:
    """What a rule knows of the round besides its updates.

    Attributes:
        index: the round, from 0; all that a rule draws at random comes from `seed` and it.
        seed: the federation's seed.
        rank: rank of the global adapter; 0 for the largest among the updates.
        start: the adapter that the sites started from; empty if unknown.
        offset: the change of the frozen base that the sites started from, `<stem>.offset_b`
            (out, q) and `<stem>.offset_a` (q, in); see `Aggregate.offset`.
        memory: what the rule's last aggregate asked to be kept.
        gauge: basis of factors that a rule makes from products; see `svd`.
        energy: share of a matrix's squared Frobenius norm that its cut must keep, in (0, 1].
        hostile: sites of which a robust rule assumes the worst.
    """

    index: int = 0
    seed: int = 0
    rank: int = 0
    start: Mapping[str, Tensor] = field(default_factory=dict)
    offset: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    gauge: str = "balanced"
    energy: float = 1.0
    hostile: int = 1


@dataclass(frozen=True)
class Aggregate:
    """What a rule makes of the updates.

    Attributes:
        tensors: one update, sorted by name, in the dtype of the contributions.
        error: relative Frobenius error of the adapters' products B A (the change of `offset`
            with them) against their exact weighted mean, over all pairs together; 0 if there are
            no pairs. Where the exact mean is zero: 0 if the rule's products are zero as well,
            else 1. A robust rule aims at another mean; its error is against that one.
        turned: whether the factors are in another basis than the sites' were, so that an
            optimiser's moments of them point nowhere and must be reset.
        offset: the change of the frozen base that holds from now on, all rounds together:
            `<stem>.offset_b` (out, q) and `<stem>.offset_a` (q, in) add their product to the
            weights that `<stem>` adapts. q is the rule's to choose. Empty: no change.
        memory: what the rule needs at the server in the next round; never sent.
        excluded: sites whose adapters a robust rule left out, sorted.
    """

    tensors: dict[str, Tensor]
    error: float
    turned: bool
    offset: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()


FIRST_ROUND = Round()


class Accumulator(ABC):
    """One round's updates on their way to becoming one; each rule is a class of its own.

    A rule whose formula is a sum folds each update in and keeps no tensor of it, so that its
    memory does not grow with the sites. A rule that needs all updates at once (a median, say)
    appends each contribution to a list in `add`, sorts the list by site in `result`, and says
    so under "Memory" in its docstring and in its card.

    Args:
        round: what is known besides the updates.

    Attributes:
        CARD: what the rule is.
    """

    CARD: ClassVar[Card]

    def __init__(self, round: Round = FIRST_ROUND) -> None:
        self._round = round
        self._books = Books(unequal_ranks=self.CARD.unequal_ranks, pairs=self.CARD.pairs)

    @classmethod
    def least(cls, hostile: int) -> int:
        """Updates that a round must have, with so many of them hostile."""
        return 1

    @abstractmethod
    def add(self, contribution: Contribution) -> None:
        """Takes one site's update; its tensors may be changed or dropped afterwards.

        Raises:
            AggregationError: if it can't count; everything is as before the call.
        """

    @abstractmethod
    def result(self) -> Aggregate:
        """The aggregate of what was added so far.

        Raises:
            AggregationError: if nothing was added.
        """


Rule = type[Accumulator]


def fold(accumulator: Accumulator, contributions: Iterable[Contribution]) -> Aggregate:
    """Adds all contributions and returns the result.

    Raises:
        AggregationError: if there is no contribution, or they do not fit together.
    """
    for one in contributions:
        accumulator.add(one)
    return accumulator.result()


class Books:
    """Who contributed with which weight, and the checks that every update passes first.

    Args:
        unequal_ranks: whether the rank of a site's adapters may be another than the others'.
        pairs: whether both factors of every adapter must be there; False where one travels alone.

    Attributes:
        pairs: the adapters that travel, sorted by stem; known after the first update. Empty if
            factors travel alone.
        dtypes: dtype of every tensor by name; known after the first update.
    """

    def __init__(self, unequal_ranks: bool = False, pairs: bool = True) -> None:
        self._unequal_ranks = unequal_ranks
        self._paired = pairs
        self.pairs: tuple[Pair, ...] = ()
        self.dtypes: dict[str, torch.dtype] = {}
        self._weights: dict[str, float] = {}
        self._kinds: dict[str, str] = {}

    def enter(self, contribution: Contribution) -> None:
        """Checks one update against those before it and notes its weight.

        Raises:
            AggregationError: if there are too many updates, the site comes twice, the weight
                is out of bounds, names, shapes or dtypes differ between sites, a value is not
                finite or too large, or a factor has no partner of its rank; nothing is noted.
        """
        site, tensors = contribution.site, contribution.tensors
        if site in self._weights:
            raise AggregationError(f"site {site!r} contributes twice; keep one update a site")
        if len(self._weights) == MOST:
            raise AggregationError(f"{MOST} updates are the most that one round may have")
        found = self.pairs
        if self._weights:
            self._check_alike(contribution)
        if self._paired and (self._unequal_ranks or not self._weights):
            found = _pairs_of(tensors)
        _check_sizes(contribution)
        if not self._weights:
            self.pairs = found
            self.dtypes = {name: tensors[name].dtype for name in sorted(tensors)}
            self._kinds = {name: self._kind(name, tensor) for name, tensor in tensors.items()}
        self._weights[site] = float(contribution.weight)

    def total(self) -> float:
        """Sum of all weights, correctly rounded and therefore the same in every order.

        Raises:
            AggregationError: if there is no update.
        """
        if not self._weights:
            raise AggregationError("no update to aggregate; at least one site must contribute")
        return math.fsum(self._weights.values())

    def shares(self) -> dict[str, float]:
        """Weights by site that add up to 1, sorted by site."""
        total = self.total()
        return {site: weight / total for site, weight in sorted(self._weights.items())}

    def _kind(self, name: str, tensor: Tensor) -> str:
        """What must be alike at all sites: dtype and shape, of factors perhaps without the rank."""
        shape: list[int | str] = list(tensor.shape)
        if self._unequal_ranks and len(shape) == 2 and name.endswith((LORA_A, LORA_B)):
            shape[0 if name.endswith(LORA_A) else 1] = "rank"
        sizes = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        return f"{str(tensor.dtype).removeprefix('torch.')} {sizes}"

    def _check_alike(self, other: Contribution) -> None:
        first = next(iter(self._weights))
        for name in sorted(set(self._kinds) ^ set(other.tensors)):
            without = other.site if name in self._kinds else first
            raise AggregationError(f"tensor {name!r} is missing at site {without!r}", name)
        for name, ours in sorted(self._kinds.items()):
            theirs = self._kind(name, other.tensors[name])
            if ours != theirs:
                raise AggregationError(
                    f"tensor {name!r} is {theirs} at site {other.site!r}, {ours} at {first!r}",
                    name,
                )


def _check_sizes(contribution: Contribution) -> None:
    """Weight and values, within what the sums can hold: see `exact_sum`."""
    site, weight = contribution.site, contribution.weight
    if not (math.isfinite(weight) and weight >= _LEAST_WEIGHT):
        raise AggregationError(
            f"weight {weight!r} of site {site!r}; expected a positive number from {_LEAST_WEIGHT:g}"
        )
    largest = 1.0
    for name, tensor in sorted(contribution.tensors.items()):
        if not tensor.is_floating_point():
            raise AggregationError(
                f"tensor {name!r} is {tensor.dtype}; only floats have a mean", name
            )
        norm = float(torch.linalg.vector_norm(tensor.detach().double()))
        if not norm <= _MOST_NORM:
            finite = bool(torch.isfinite(tensor).all())
            fault = f"has a norm above {_MOST_NORM:g}" if finite else "holds nan or infinity"
            raise AggregationError(
                f"tensor {name!r} of site {site!r} {fault}; refuse the update", name
            )
        largest = max(largest, norm)
    # No entry of a weighted tensor or of a weighted product B A can be larger than this.
    if not weight * largest * largest <= LIMIT:
        raise AggregationError(
            f"weight {weight!r} of site {site!r} is too large for values of norm {largest:g}; "
            "scale all weights down"
        )


def _pairs_of(tensors: Mapping[str, Tensor]) -> tuple[Pair, ...]:
    try:
        found = pairs(tensors)
    except ValueError as error:
        raise AggregationError(f"{error}; send both factors") from error
    for pair in found:
        a, b = tuple(tensors[pair.a].shape), tuple(tensors[pair.b].shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            raise AggregationError(
                f"adapter {pair.stem!r}: A is {a}, B is {b}; expected (rank, in) and (out, rank)",
                pair.a,
            )
    return found


def dense_copies(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Tensors sorted by name, in the updates' dtypes, each alone in its storage.

    Slices of a stack, or columns as rows, can't be sent.
    """
    return {
        name: tensors[name].to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name, dtype in sorted(dtypes.items())
    }


def relative_error(error_squares: float, exact_squares: float) -> float:
    """sqrt(error / exact) of two sums of squares; see `Aggregate.error` for a zero mean."""
    if exact_squares <= 0:
        return 1.0 if error_squares > 0 else 0.0
    return math.sqrt(max(error_squares, 0.0) / exact_squares)
