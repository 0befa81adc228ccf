"""Rule `stack`: the mean product goes into the frozen base, the adapter starts afresh
(FLoRA, arXiv 2409.05976; cut by energy as in FLoRIST, arXiv 2506.09199).

    D' = D + sum_k w_k B_k A_k  =  [D_b, w_1 B_1, ..., w_k B_k] [D_a; A_1; ...; A_k],   B = 0

D is the offset that the sites added to their frozen weights at the start of the round, D' that
of the next one. A is drawn again, normal with std 1 / sqrt(in), from the federation's seed, the
round and the tensor's name. D' is sent as factors, of the smallest rank q that keeps the share
`energy` of its squared norm; with 1 all that float32 can resolve beside the mean product and D.

Bytes: up one adapter; down one adapter and D', (out + in) q numbers a pair. q grows by up to
k r in a round of k sites, up to the shorter side. Exact with energy 1; the rest is the rule's
error. The factors are others than the sites' were: moments must be reset.

Sites of unequal ranks stack by nature. The fresh adapter has the federation's rank, or the
largest of the round.

Memory: three float64 copies of the heads and tokens, and the mean products: see
`products.ProductSum`. It does not grow with the sites.
"""

from __future__ import annotations

from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.low_rank import mean_of
from flap_nvflare.aggregation.offset import Offset, check_energy, new_offset, with_offsets
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.products import Products
from flap_nvflare.aggregation.ranks import drawn
from flap_nvflare.aggregation.rule import (
    FIRST_ROUND,
    Accumulator,
    Aggregate,
    Card,
    Contribution,
    Round,
    dense_copies,
)
from flap_nvflare.aggregation.weighted_means import WeightedMeans


class Stack(Accumulator):
    """The mean product as a change of the base, and a fresh adapter.

    Args:
        round: its seed, index, offset, energy and rank.

    Raises:
        AggregationError: if the energy is not in (0, 1].
    """

    CARD = Card(
        paper="FLoRA, arXiv 2409.05976; FLoRIST, arXiv 2506.09199",
        formula="base += sum w_k B_k A_k; A is drawn again, B = 0",
        exact="yes (with energy 1)",
        offset=True,
        unequal_ranks=True,
    )

    def __init__(self, round: Round = FIRST_ROUND) -> None:
        super().__init__(round)
        check_energy(round)
        self._means = WeightedMeans()
        self._products = Products()

    def add(self, contribution: Contribution) -> None:
        """Folds one update in; see `Accumulator.add`."""
        self._books.enter(contribution)
        factors = {name for pair in self._books.pairs for name in (pair.a, pair.b)}
        self._means.add(contribution, contribution.tensors.keys() - factors)
        self._products.add(contribution, self._books.pairs)

    def result(self) -> Aggregate:
        """The new offset with its error and the fresh adapter; see `Accumulator.result`."""
        total, shares = self._books.total(), self._books.shares()
        dtypes, pairs = self._books.dtypes, self._books.pairs
        tensors = self._means.result(total)
        for pair in pairs:
            tensors[pair.b], tensors[pair.a] = self._fresh(pair)

        def change(pair: Pair) -> Offset:
            mean = mean_of(self._products.of(pair), total, shares)
            return new_offset(mean, pair, self._round, dtypes[pair.b])

        offsets = each(change, pairs)
        return with_offsets(dense_copies(tensors, dtypes), offsets, turned=bool(pairs))

    def _fresh(self, pair: Pair) -> tuple[Tensor, Tensor]:
        product = self._products.of(pair)
        rows, columns = product.shape
        rank = self._round.rank or product.rank
        a = drawn(pair.a, (rank, columns), self._round)
        return a.new_zeros((rows, rank)), a
