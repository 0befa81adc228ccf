"""FLARE's simulator with sites that are forked, and not started.

    python -m flap_nvflare.flare.forked_simulator JOB -t 8

The same options, the same job, the same result as with `nvflare simulator`. There each task of a
site is a new Python process (with as many threads as sites: each site), and most of its time goes
into importing torch and MONAI. Here they are forked from one process that has imported them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nvflare.private.fed.app.simulator import simulator_runner
from nvflare.private.fed.app.simulator.simulator import define_simulator_parser, run_simulator

from flap_nvflare.fork_server import Forked, ForkServer

# Nothing of FLARE, which draws at import what must differ between processes: with one and the same
# number of its first stream, the second process of a site waits for five minutes.
MODULES = (
    "flap_nvflare.bundle.workflow",
    "flap_nvflare.bundle.builders",
    "flap_nvflare.data.augment",
    "flap_nvflare.data.prepared",
    "flap_nvflare.training.loss",
    "flap_nvflare.training.site_round",
    "torch._dynamo",  # which an optimiser's first step imports
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the simulator; its exit code, as FLARE's own, says little: look at the results."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.flare.forked_simulator",
        description="FLARE's simulator with sites that are forked and not started.",
    )
    define_simulator_parser(parser)
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="flap_forks_") as folder:
        try:
            server = ForkServer(Path(folder) / "socket", MODULES)
        except OSError as error:
            print(f"simulate: {error}; see above why", file=sys.stderr)
            return 1
        own = simulator_runner.subprocess
        simulator_runner.subprocess = _forking(server, own)
        try:
            return int(run_simulator(parsed) or 0)
        finally:
            simulator_runner.subprocess = own
            server.close()


def _forking(server: ForkServer, own: Any) -> SimpleNamespace:
    """The module `subprocess` as FLARE's simulator uses it: its one call starts a site.

    FLARE gives a site's process ten seconds to connect to the server, which a hundred that start
    together on few cores do not keep: they start one after the other, a second's work apart.
    """
    turn, pace = threading.Lock(), 1.0 / (os.cpu_count() or 1)

    def start(command: Sequence[str], env: dict[str, str], **_: Any) -> Forked:
        executable, flag, *rest = command
        if executable != sys.executable or flag != "-m":
            raise ValueError(f"FLARE's simulator starts {command[:3]}, not python -m MODULE")
        with turn:
            time.sleep(pace)
            return server.run(rest, env)

    return SimpleNamespace(Popen=start, TimeoutExpired=own.TimeoutExpired)


if __name__ == "__main__":
    sys.exit(main())
