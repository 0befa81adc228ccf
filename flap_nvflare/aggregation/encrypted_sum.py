"""The sum of updates that nobody at the server can read: what a linear rule is under encryption.

    Enc(sum_k w_k x_k) = sum_k Enc(w_k x_k),    beside it sum_k w_k in the clear

Whatever a linear rule's sites send (`Card.linear`), the weighted mean of it is the rule's result,
so one sum serves all of them. The relative error of products can't be known
here: it is nan.

Ciphertexts are added modulo whole numbers: the bytes are the same in every order of arrival.
Memory: one sealed update, whatever the number of sites.
"""

from __future__ import annotations

import math
from typing import Any

from flap_nvflare.adapter.cipher import MOST_SITES, Cipher, CipherError
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.aggregation.rule import (
    Accumulator,
    Aggregate,
    AggregationError,
    Card,
    Contribution,
)


class EncryptedSum(Accumulator):
    """One round's sealed updates on their way to becoming one.

    Args:
        cipher: with a context that needs no secret key, and should have none.
        plain: what the sealed updates hold.
    """

    CARD = Card(
        paper="CKKS, ePrint 2016/421",
        formula="Enc(sum w_k x_k) = sum Enc(w_k x_k)",
        exact="as the linear rule whose updates are sealed",
        linear=True,
    )

    def __init__(self, cipher: Cipher, plain: UpdateSpec) -> None:
        super().__init__()
        self._cipher = cipher
        self._plain = plain
        self._pieces: list[Any] = []
        self._weights: dict[str, float] = {}

    def add(self, contribution: Contribution) -> None:
        """Checks a site's sealed update and adds it.

        Args:
            contribution: tensors as `Cipher.seal` gives them; the weight that the message claims
                must be the sealed one.

        Raises:
            AggregationError: if it can't count; everything is as before the call.
        """
        site, weight = contribution.site, contribution.weight
        if site in self._weights:
            raise AggregationError(f"site {site!r} contributes twice; keep one update a site")
        if len(self._weights) == MOST_SITES:
            raise AggregationError(f"{MOST_SITES} updates are the most that can be added encrypted")
        try:
            pieces, sealed_with = self._cipher.read(contribution.tensors, self._plain)
        except CipherError as error:
            raise AggregationError(str(error)) from error
        if sealed_with != weight:
            raise AggregationError(f"sealed with weight {sealed_with!r}, but sent with {weight!r}")
        if self._pieces:
            pieces = [ours + theirs for ours, theirs in zip(self._pieces, pieces, strict=True)]
        self._pieces = pieces
        self._weights[site] = weight

    def result(self) -> Aggregate:
        """The sealed sum with the sum of the weights; `Cipher.open` makes it the mean.

        Raises:
            AggregationError: if nothing was added.
        """
        if not self._weights:
            raise AggregationError("no update to aggregate; at least one site must contribute")
        sealed = self._cipher.pack(self._pieces, math.fsum(self._weights.values()))
        return Aggregate(sealed, error=math.nan, turned=False)
