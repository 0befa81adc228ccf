"""Rule `ffa`: A stays as it was drawn, B alone is trained and averaged (FFA-LoRA,
arXiv 2403.12313).

    B = sum_k w_k B_k,      so  B A = sum_k w_k B_k A

Bytes up and down: B and the head, about half an adapter. Exact: all sites have the same A, so
the mean of B is the mean of the products. What it costs is freedom: the adapters' rows never
leave the space that the first draw of A spans. Noise added for privacy stays linear, too, while
noise on both factors is multiplied with itself.

Memory: see `linear`.
"""

from __future__ import annotations

from flap_nvflare.aggregation.linear import Linear
from flap_nvflare.aggregation.rule import Card


class Ffa(Linear):
    """The weighted mean of B and the head."""

    CARD = Card(
        paper="FFA-LoRA, arXiv 2403.12313",
        formula="B = sum w_k B_k, A as drawn",
        exact="yes",
        trains="b",
        linear=True,
    )
