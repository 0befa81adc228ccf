"""Rule `core`: a small matrix between two frozen factors is trained and averaged (Fed-SB,
arXiv 2502.15436).

    dW = B R A,     R = sum_k w_k R_k,      so  B R A = sum_k w_k B R_k A

R is (r, r) and is named `<stem>.lora_core`. Bytes up and down: r^2 numbers an adapter and the
head, whatever the width of the network. Exact: B and A are the same at all sites and never
change. What it costs is freedom: rows and columns stay in the spaces that were drawn, so it
wants a larger rank than the other rules.

Memory: see `linear`.
"""

from __future__ import annotations

from flap_nvflare.aggregation.linear import Linear
from flap_nvflare.aggregation.rule import Card


class Core(Linear):
    """The weighted mean of R and the head."""

    CARD = Card(
        paper="Fed-SB, arXiv 2502.15436",
        formula="R = sum w_k R_k in dW = B R A, B and A as drawn",
        exact="yes",
        trains="core",
        linear=True,
    )
