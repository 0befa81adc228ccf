"""Which sites a round draws: k of n, by the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest

from flap_nvflare.aggregation.sampling import sampled_sites
from flap_nvflare.settings import Federation

SITES = ("D", "A", "F", "C", "B", "E")


@pytest.mark.parametrize("count", [0, 6, 7])
def test_all_sites_unless_fewer_are_asked_for(count: int) -> None:
    assert sampled_sites(Federation(sites_per_round=count), 3, SITES) == sorted(SITES)


def test_as_many_sites_as_asked_for_and_none_twice() -> None:
    for index in range(20):
        found = sampled_sites(Federation(sites_per_round=4), index, SITES)
        assert len(set(found)) == 4
        assert found == sorted(found)
        assert set(found) <= set(SITES)


def test_seed_and_round_decide_and_the_order_of_names_does_not() -> None:
    def drawn(seed: int, names: tuple[str, ...] = SITES) -> list[list[str]]:
        federation = Federation(sites_per_round=3, seed=seed)
        return [sampled_sites(federation, index, names) for index in range(10)]

    assert drawn(0) == drawn(0, SITES[::-1])
    assert drawn(0) != drawn(1)
    assert len({tuple(sites) for sites in drawn(0)}) > 1


def test_the_draw_is_the_same_on_every_machine() -> None:
    # A run that goes on elsewhere must ask the same sites: these may never change.
    federation = Federation(sites_per_round=2, seed=7)
    found = [sampled_sites(federation, index, SITES) for index in range(3)]
    assert found == [["C", "E"], ["D", "F"], ["D", "E"]]


def test_every_site_has_its_turn_equally_often() -> None:
    federation = Federation(sites_per_round=2)
    counts = Counter(site for i in range(600) for site in sampled_sites(federation, i, SITES))
    assert all(140 < counts[site] < 260 for site in SITES)  # 200 each, four deviations of 12
