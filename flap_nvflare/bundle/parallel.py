"""A process of those that train a site's round together: `-m flap_nvflare.bundle.parallel FOLDER`.

`bundle.torchrun` starts as many as the site's `processes` says. Each builds the site's work from
train.yaml and multi_gpu_train.yaml, starts from the folder's adapter and moments and takes its
rows of every batch; the first writes the result.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from flap_nvflare.bundle.round_files import RoundFolder
from flap_nvflare.parents import end_with_parent


def main(path: str) -> None:
    """Trains the round of the folder at `path`, as one of several processes."""
    train(RoundFolder(Path(path)), int(os.environ["RANK"]), together=True)


def train(folder: RoundFolder, rank: int, together: bool) -> None:
    """Trains the round that the folder asks for; its error is kept there as well.

    Args:
        folder: the round's files.
        rank: the number of this process.
        together: whether it is one of those that torchrun started.
    """
    end_with_parent(signal.SIGKILL)
    try:
        _train(folder, together)
    except BaseException as error:
        folder.fail(rank, error)
        raise


def _train(folder: RoundFolder, together: bool) -> None:
    from flap_nvflare.bundle.workflow import MULTI_GPU_CONFIG, TRAIN_CONFIG, build_work

    federation, site, round_index = folder.request()
    configs = (TRAIN_CONFIG, MULTI_GPU_CONFIG) if together else (TRAIN_CONFIG,)
    work = build_work(federation, site, configs)
    folder.start(work)
    first = work.ranks.first
    report = work.train(round_index, folder.abandoned, folder.tell if first else None)
    if first:
        folder.answer(work, report)
    work.ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1])
