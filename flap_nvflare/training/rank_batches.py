"""Batches of a site dealt out to the processes that train it together."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import BatchSampler, Sampler


class RankBatches(Sampler[list[int]]):
    """One process's rows of every batch; all processes take the same number of steps.

    Every process draws all batches in the same order, from a sampler of the same seed, and of
    each batch takes rows `rank`, `rank + count` and so on. Together they so see, at each step,
    the `batch_size` slices that one process sees. Of a batch with fewer rows than processes
    (the last one, or all if `batch_size` is small) a process without a row of its own takes the
    first row with share 0: it must take the step, since the others wait for its gradients, and
    adds nothing to it.

    Weighed by `shares`, the mean of the processes' gradients is that of the whole batch where
    the loss is a mean over slices, as cross entropy is. The soft Dice term of a batch is none:
    each process takes it over its own rows, so several processes train on the Dice of smaller
    batches.

    Args:
        sampler: draws the slices of an epoch; of a fixed length.
        batch_size: rows of a whole batch, over all processes.
        rank: this process, from 0.
        count: number of processes.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, rank: int = 0, count: int = 1
    ) -> None:
        if not 0 <= rank < count:
            raise ValueError(f"rank {rank} is none of {count} processes; expected 0 to {count - 1}")
        self._batches = BatchSampler(sampler, batch_size, drop_last=False)
        self._rows = len(sampler)  # type: ignore[arg-type]
        self._batch_size = batch_size
        self._rank = rank
        self._count = count

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch[self._rank :: self._count] or batch[:1]

    @property
    def shares(self) -> tuple[float, ...]:
        """This process's share of the rows of every batch of an epoch; over all ranks 1."""
        sizes = [
            min(self._batch_size, self._rows - start)
            for start in range(0, self._rows, self._batch_size)
        ]
        return tuple(len(range(self._rank, size, self._count)) / size for size in sizes)
