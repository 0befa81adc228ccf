"""Rule `alternate`: B is trained and averaged in even rounds, A in odd ones (RoLoRA,
arXiv 2502.01755).

    round 0, 2, ...:  B = sum_k w_k B_k,     A stays:  B A = sum_k w_k B_k A
    round 1, 3, ...:  A = sum_k w_k A_k,     B stays:  B A = sum_k w_k B A_k

Bytes up: the factor that trained and the head, about half an adapter; down the whole adapter,
since a site that missed a round lacks the other factor. Exact in every round: the factor that
did not train is the same at all sites. Unlike `ffa` both factors learn. B comes first because it
starts at zero, where A has no gradient.

Memory: see `linear`.
"""

from __future__ import annotations

from flap_nvflare.aggregation.linear import Linear
from flap_nvflare.aggregation.rule import Card


class Alternate(Linear):
    """The weighted mean of the head and of the factor that trained in this round."""

    CARD = Card(
        paper="RoLoRA, arXiv 2502.01755",
        formula="B = sum w_k B_k in even rounds, A = sum w_k A_k in odd ones",
        exact="yes",
        trains="alternate",
        linear=True,
    )
