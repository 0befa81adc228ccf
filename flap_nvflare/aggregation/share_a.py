"""Rule `share_a`: A is shared, each site keeps a B of its own (FedSA-LoRA, arXiv 2410.01463).

    A = sum_k w_k A_k,      site k goes on with  B_k A

Bytes up and down: A and the head, about half an adapter. The mean of A is exact. There is no
mean of the products to be exact about: B_k never leaves its site, each site has another product,
and A changes under a B_k that was trained with another A, by B_k (A - A_k). The paper's ground
for it: A learns what the sites have in common, B what is theirs. There is no global model; a new
site starts with B at zero.

Memory: see `linear`.
"""

from __future__ import annotations

from flap_nvflare.aggregation.linear import Linear
from flap_nvflare.aggregation.rule import Card


class ShareA(Linear):
    """The weighted mean of A and the head."""

    CARD = Card(
        paper="FedSA-LoRA, arXiv 2410.01463",
        formula="A = sum w_k A_k, B_k stays at site k",
        exact="for A; each site has a product of its own",
        private="b",
        linear=True,
    )
