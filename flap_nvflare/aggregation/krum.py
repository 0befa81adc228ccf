"""Rule `krum`: of n sites the n - f whose products lie closest together (multi-Krum, Blanchard
et al., NeurIPS 2017, arXiv 1703.02757), and the trimmed mean of the head (Yin et al.,
arXiv 1803.01498); f is the setting `hostile`.

    score of k = sum of |M_k - M_l|^2 over its n - f - 2 nearest l
    adapter:     B A = the clipped mean, see `robust`, of the n - f sites with the least score
    head:        of every coordinate the mean of what is left without the f highest and f lowest

Distances are of products, all adapters together, so that a site can't hide in another basis;
ties go to the name that comes first. The trimmed mean looks at no weights, as a median.

Bytes up and down: one adapter a site each. Not exact: f sites are left out in every round, the
hostile or else the ones most unlike the others; `Aggregate.excluded` names them. Needs
n >= 2 f + 3. Without hostile sites (f = 0) nobody is left out.

Time: every site's distance from every other, so n^2; all else is linear. See `geometry` for the
cheaper of two ways to it. Memory: see `robust`, and n^2 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import Pair
from flap_nvflare.aggregation.geometry import gram_matrix, squared_distance
from flap_nvflare.aggregation.ranks import padded
from flap_nvflare.aggregation.robust import Robust
from flap_nvflare.aggregation.rule import Card, Contribution


class Krum(Robust):
    """Trimmed mean of the head, clipped mean product of the sites closest together."""

    CARD = Card(
        paper="multi-Krum, arXiv 1703.02757; trimmed mean, arXiv 1803.01498",
        formula="head: trimmed mean; B A = cut of the clipped mean of the n - f closest M_k",
        exact="no: the f sites furthest from the others are left out",
        unequal_ranks=True,
        streaming=False,
        robust=True,
    )

    @classmethod
    def least(cls, hostile: int) -> int:
        """Updates that there must be for so many hostile ones to be bounded."""
        return 2 * hostile + 3 if hostile else 1

    def _centre(self, ordered: Tensor) -> Tensor:
        drop = self._round.hostile
        return ordered[drop : len(ordered) - drop].mean(dim=0, dtype=torch.float64)

    def _chosen(self, sites: Sequence[Contribution]) -> list[int]:
        count, hostile = len(sites), self._round.hostile
        if not hostile:
            return list(range(count))
        pairs = self._books.pairs
        gram = gram_matrix(_of_one_rank([one.tensors for one in sites], pairs), pairs)
        nearest = max(count - hostile - 2, 0)
        scores = []
        for one in range(count):
            distances = sorted(squared_distance(gram, one, k) for k in range(count) if k != one)
            scores.append(sum(distances[:nearest]))
        return sorted(sorted(range(count), key=lambda k: scores[k])[: count - hostile])


def _of_one_rank(
    sites: Sequence[Mapping[str, Tensor]], pairs: Sequence[Pair]
) -> list[dict[str, Tensor]]:
    """The factors with zeros up to the largest rank of each adapter: the products are the same."""
    found: list[dict[str, Tensor]] = [{} for _ in sites]
    for pair in pairs:
        rank = max(one[pair.a].shape[0] for one in sites)
        for one, filled in zip(sites, found, strict=True):
            filled[pair.a] = padded(one[pair.a], (rank, one[pair.a].shape[1]))
            filled[pair.b] = padded(one[pair.b], (one[pair.b].shape[0], rank))
    return found
