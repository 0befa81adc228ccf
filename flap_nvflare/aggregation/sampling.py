"""Which sites take part in a round: k of n, drawn from the federation's seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from flap_nvflare.settings import Federation


def sampled_sites(federation: Federation, round_index: int, sites: Sequence[str]) -> list[str]:
    """The sites that train in the round, sorted; all of them unless `sites_per_round` says fewer.

    Args:
        federation: its `sites_per_round` and `seed`.
        round_index: the round, from 0.
        sites: names of all sites, in any order.
    """
    everyone = sorted(sites)
    count = federation.sites_per_round
    if count == 0 or count >= len(everyone):
        return everyone
    # Seeded by a text, which Python hashes the same in every process.
    draw = random.Random(f"sites of round {round_index}, seed {federation.seed}")
    return sorted(draw.sample(everyone, count))
