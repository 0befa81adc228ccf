"""Rule `median`: the median of every coordinate of the head, and for adapters the mean of the
changes of products clipped to their median length (Yin et al., arXiv 1803.01498; clipping as in
Sun et al., arXiv 1911.07963).

    head:     x = median of x_k, coordinate by coordinate, all sites alike
    adapter:  B A = the cut of M_0 + sum_k p_k min(1, m / |M_k - M_0|) (M_k - M_0), see `robust`

The median does not look at weights: a weight is what a site says of itself, and one site with
more than half of it would be the median. While fewer than half of the sites are hostile, every
coordinate lies between honest ones.

Bytes up and down: one adapter a site each. Not exact, and not meant to be: of sites that differ
the median is not the mean. No site is excluded. Time linear in the sites. Memory: see `robust`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flap_nvflare.aggregation.robust import Robust
from flap_nvflare.aggregation.rule import Card, Contribution


class Median(Robust):
    """Median head, clipped mean product."""

    CARD = Card(
        paper="coordinate-wise median, arXiv 1803.01498; clipped changes, arXiv 1911.07963",
        formula="head: median; B A = cut of M_0 + sum p_k clip(M_k - M_0)",
        exact="no: each site's change counts up to the median length",
        unequal_ranks=True,
        streaming=False,
        robust=True,
    )

    @classmethod
    def least(cls, hostile: int) -> int:
        """Updates that there must be for so many hostile ones to be bounded."""
        return 2 * hostile + 1

    def _centre(self, ordered: Tensor) -> Tensor:
        count = len(ordered)
        return (ordered[(count - 1) // 2].double() + ordered[count // 2].double()) / 2

    def _chosen(self, sites: Sequence[Contribution]) -> list[int]:
        return list(range(len(sites)))
