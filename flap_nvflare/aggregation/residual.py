"""Rule `residual`: the mean of the factors, and what it misses as a change of the frozen base
(FedEx-LoRA, arXiv 2410.09432; cut by energy as in FLoRIST, arXiv 2506.09199).

    A = sum_k w_k A_k,   B = sum_k w_k B_k,   D' = D + sum_k w_k B_k A_k - B A

D is the offset that the sites added to their frozen weights at the start of the round, D' that
of the next one: the sites' weights W + D' + B A are exactly the mean of their W + D + B_k A_k.
D' is sent as factors, of the smallest rank q that keeps the share `energy` of its squared norm;
with 1 all that float32 can resolve beside the mean product and D.

Bytes: up one adapter; down one adapter and D', (out + in) q numbers a pair. q grows by up to
(k - 1) r in a round of k sites, up to the shorter side. Exact with energy 1; the rest is the
rule's error. The factors keep their basis, so moments stay valid. D' is made against B and A as
they are sent, so their rounding is no error either.

Sites of unequal ranks: factors are padded with zeros to the largest, and D' makes up for it at
sites of the federation's rank. One of a smaller rank q has W + D' + B[:, :q] A[:q] only.

Memory: three float64 copies of one update, and the mean products: see `products.ProductSum`.
It does not grow with the sites.
"""

from __future__ import annotations

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.low_rank import mean_of
from flap_nvflare.aggregation.mean import Mean
from flap_nvflare.aggregation.offset import Offset, check_energy, new_offset, with_offsets
from flap_nvflare.aggregation.parallel import each
from flap_nvflare.aggregation.ranks import grown
from flap_nvflare.aggregation.rule import FIRST_ROUND, Aggregate, Card, Round, dense_copies


class Residual(Mean):
    """The mean of the factors, exact by the offset of the base.

    Args:
        round: its offset, energy and rank.

    Raises:
        AggregationError: if the energy is not in (0, 1].
    """

    CARD = Card(
        paper="FedEx-LoRA, arXiv 2410.09432; FLoRIST, arXiv 2506.09199",
        formula="A, B = the means of factors; base += sum w_k B_k A_k - B A",
        exact="yes (with energy 1)",
        offset=True,
        unequal_ranks=True,
    )

    def __init__(self, round: Round = FIRST_ROUND) -> None:
        super().__init__(round)
        check_energy(round)

    def result(self) -> Aggregate:
        """The means, the new offset and its error; see `Accumulator.result`."""
        total, shares = self._books.total(), self._books.shares()
        dtypes, pairs = self._books.dtypes, self._books.pairs
        means = self._means.result(total)
        for pair in pairs:
            means[pair.b], means[pair.a] = grown(means[pair.b], means[pair.a], pair.a, self._round)
        tensors = dense_copies(means, dtypes)

        def change(pair: Pair) -> Offset:
            mean = mean_of(self._products.of(pair), total, shares)
            sent = tensors[pair.b], tensors[pair.a]
            return new_offset(mean, pair, self._round, dtypes[pair.b], sent)

        return with_offsets(tensors, each(change, pairs), turned=False)
