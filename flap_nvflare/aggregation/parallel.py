"""Work on many adapters or tensors at once, each on one thread.

The linear algebra of one adapter is a long row of small steps. Spread over threads, all of
them wait for the slowest after every step, and a busy core makes that a hundred times slower;
and their number can change the last bits. One adapter on one thread has neither fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in their order, on as many threads as torch has.

    Meanwhile torch is set to one thread in the whole process.
    """
    todo, threads = list(items), torch.get_num_threads()
    workers = min(threads, len(todo))
    try:
        if workers < 2:
            torch.set_num_threads(1)
            return [work(item) for item in todo]
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, todo))
    finally:
        torch.set_num_threads(threads)
