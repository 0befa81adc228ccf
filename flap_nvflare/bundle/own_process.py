"""The process that trains a site's round alone: `-m flap_nvflare.bundle.own_process FOLDER`.

What ends it (no memory left, a fault of a driver) ends this round at this site and nothing else.
It does what the process that asked would have done, from the same files, to the same bytes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flap_nvflare.bundle.parallel import train
from flap_nvflare.bundle.round_files import RoundFolder
from flap_nvflare.bundle.torchrun import print_into

OWN_OUTPUT = "process.log"


def main(path: str) -> None:
    """Trains the round of the folder at `path`."""
    folder = RoundFolder(Path(path))
    print_into(folder.path / OWN_OUTPUT)
    train(folder, rank=0, together=False)
    # All files are written whole. Taking torch down in order would cost the site a second more.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
