"""What the linear rules share: the weighted mean of every tensor that came.

Where one matrix of an adapter trains and the others are the same at all sites, the product is
linear in it, so the mean of that matrix is the mean of the products: sum_k w_k B_k A = B A.
A sum of plain tensors can be encrypted and masked as well.

Memory: three float64 copies of one update. It does not grow with the sites.
"""

from __future__ import annotations

from flap_nvflare.adapter.factors import LORA_A, LORA_B
from flap_nvflare.aggregation.rule import (
    FIRST_ROUND,
    Accumulator,
    Aggregate,
    AggregationError,
    Card,
    Contribution,
    Round,
    dense_copies,
)
from flap_nvflare.aggregation.weighted_means import WeightedMeans

LORA_CORE = ".lora_core"


class Linear(Accumulator):
    """The weighted mean of what travels; an adapter's other matrices are refused.

    The result has the names of the updates and no others: what did not train is the receiver's.
    """

    def __init__(self, round: Round = FIRST_ROUND) -> None:
        super().__init__(round)
        self._means = WeightedMeans()
        self._travelling = travelling(self.CARD, round.index)

    def add(self, contribution: Contribution) -> None:
        """Folds one update in; see `Accumulator.add`.

        Raises:
            AggregationError: also if it holds a matrix of an adapter that does not travel.
        """
        for name in sorted(contribution.tensors):
            ending = name[name.rfind(".") :]
            if ending in (LORA_A, LORA_B, LORA_CORE) and ending != self._travelling:
                raise AggregationError(
                    f"tensor {name!r} of site {contribution.site!r} does not travel in round "
                    f"{self._round.index}; of an adapter send {self._travelling!r} alone",
                    name,
                )
        self._books.enter(contribution)
        self._means.add(contribution, contribution.tensors)

    def result(self) -> Aggregate:
        """The means, which have no error; see `Accumulator.result`."""
        means = self._means.result(self._books.total())
        return Aggregate(dense_copies(means, self._books.dtypes), error=0.0, turned=False)


def travelling(card: Card, index: int) -> str:
    """Ending of the one matrix of an adapter that travels in round `index`."""
    if card.trains == "core":
        return LORA_CORE
    if card.trains == "b":
        return LORA_B
    if card.trains == "alternate":
        return LORA_A if index % 2 else LORA_B
    return LORA_A if card.private == "b" else ""
