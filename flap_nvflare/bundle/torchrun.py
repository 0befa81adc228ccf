"""torchrun for a site's round, naming who failed: `-m flap_nvflare.bundle.torchrun FOLDER`.

The command torchrun prints how its processes ended and keeps no more of it than an exit code.
This module calls the same launcher in Python and writes down which process failed first and why.
On SIGTERM it ends all processes, by SIGKILL those that have not gone after 30 s.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from flap_nvflare.bundle.round_files import Failure, RoundFolder

OUTPUT = "output"  # folder with what each process printed
LAUNCHER_OUTPUT = "torchrun.log"


def main(path: str) -> None:
    """Trains the round of the folder at `path` with the processes of its site.

    Raises:
        ChildFailedError: if a process failed; the folder then holds which and why.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    folder = RoundFolder(Path(path))
    print_into(folder.path / LAUNCHER_OUTPUT)
    _, site, _ = folder.request()
    try:
        run(
            parse_args(
                [
                    "--standalone",
                    "--local_addr=localhost",  # a site's own name may resolve to nothing
                    f"--nproc_per_node={site.processes}",
                    "--redirects=3",
                    f"--log_dir={folder.path / OUTPUT}",
                    "--module",
                    "flap_nvflare.bundle.parallel",
                    path,
                ]
            )
        )
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        folder.settle(first_failure(codes, folder.failures()))
        raise


def first_failure(codes: Mapping[int, int], kept: list[Failure]) -> Failure:
    """The failure that the others follow from.

    A process that a signal killed leaves the others with broken connections, of which they then
    complain; SIGTERM is how torchrun itself ends the others.

    Args:
        codes: exit codes of the failed processes by rank; -n for signal n.
        kept: the errors that processes wrote down, the first first.
    """
    own = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM}
    killed = sorted(rank for rank, code in own.items() if code < 0)
    if kept and not killed:
        return kept[0]
    rank = killed[0] if killed else min(own or codes)
    code = codes[rank]
    return Failure(rank, ended_by(code), 0.0, exit_code=code)


def ended_by(code: int) -> str:
    """What an exit code says; -n for signal n."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def print_into(path: Path) -> None:
    """Sends all that this process prints to a file: its parent's output is the site's log."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    os.close(file)


if __name__ == "__main__":
    main(sys.argv[1])
