"""A federation in FLARE's simulator from a file of settings, for programs.

    python -m flap_nvflare.flare.simulate SETTINGS WORKSPACE JOB THREADS SITE [SITE ...]

SETTINGS is JSON as `Federation.to_dict` gives it. FLAP_HOME says where the run's folder lies,
FLAP_DATA_ROOT where the scans are. FLARE may end a refused job with 0: look for the run's files.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from nvflare.recipe import SimEnv

from flap_nvflare.flare.recipe import FlapRecipe
from flap_nvflare.parents import end_with_parent


def main(arguments: Sequence[str]) -> None:
    """Runs the federation of the command line."""
    # FLARE ends its own processes when interrupted; a shell lets what it runs in the background
    # ignore the keyboard's signal, so it is another one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_with_parent(signal.SIGTERM)
    settings, workspace, job, threads, *sites = arguments
    changes = json.loads(Path(settings).read_text(encoding="utf-8"))
    env = SimEnv(clients=sites, num_threads=min(int(threads), len(sites)), workspace_root=workspace)
    FlapRecipe(name=job, profile="demo", **changes).execute(env)


if __name__ == "__main__":
    main(sys.argv[1:])
