from __future__ import annotations

import threading

import pytest
import torch
from aggregation_cases import equal_bits, random_sites

from flap_nvflare.aggregation import RULES, aggregate
from flap_nvflare.aggregation.parallel import each


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_in_order_on_one_thread_each(threads: int) -> None:
    def work(item: int) -> tuple[int, int, str]:
        return item * item, torch.get_num_threads(), threading.current_thread().name

    found = each(work, range(5))
    assert [one[:2] for one in found] == [(0, 1), (1, 1), (4, 1), (9, 1), (16, 1)]
    assert len({one[2] for one in found}) <= threads
    assert torch.get_num_threads() == threads


def test_an_error_comes_out_and_leaves_torch_as_it_was(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        each(lambda item: 1 // item, [1, 0, 2])
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("rule", sorted(name for name in RULES if RULES[name].CARD.pairs))
def test_the_number_of_threads_changes_no_bit(rule: str, threads: int) -> None:
    sites = random_sites(5, [(200, 180, 16), (120, 400, 16)])  # the least of rule krum
    found = aggregate(rule, sites)
    torch.set_num_threads(3 - threads)
    assert equal_bits(found, aggregate(rule, sites))
