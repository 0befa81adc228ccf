"""A process of those that train a site's round together: `-m flap_nvflare.bundle.parallel FOLDER`.

`bundle.torchrun` starts as many as the site's `processes` says. Each builds the site's work from
train.yaml and multi_gpu_train.yaml, starts from the folder's adapter and moments and takes its
rows of every batch; the first writes the result.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flap_nvflare.bundle.round_files import RoundFolder

_PR_SET_PDEATHSIG = 1


def main(path: str) -> None:
    """Trains the round of the folder at `path`."""
    _end_with_parent()
    from flap_nvflare.bundle.round_files import RoundFolder

    folder = RoundFolder(Path(path))
    try:
        _train(folder)
    except Exception as error:
        folder.fail(int(os.environ["RANK"]), f"{type(error).__name__}: {error}")
        raise


def _train(folder: RoundFolder) -> None:
    from flap_nvflare.bundle.workflow import MULTI_GPU_CONFIG, TRAIN_CONFIG, build_work

    federation, site, round_index = folder.request()
    work = build_work(federation, site, (TRAIN_CONFIG, MULTI_GPU_CONFIG))
    folder.start(work)
    first = work.ranks.first
    report = work.train(round_index, folder.abandoned, folder.tell if first else None)
    if first:
        folder.answer(work, report)
    work.ranks.leave()


def _end_with_parent() -> None:
    """Lets the kernel end this process with torchrun, should that be killed.

    torchrun starts each process in a session of its own, which no signal to its group reaches.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
