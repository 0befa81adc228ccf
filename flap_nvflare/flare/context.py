"""What a component finds around it: the job's settings, the run's folder, the site's disk."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace

from flap_nvflare.settings import (
    CHECKPOINT_VARIABLE,
    DATA_VARIABLE,
    HARDWARE,
    Federation,
    SettingsError,
    Site,
    switch,
)

_Number = TypeVar("_Number", int, float)

_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")

HOME_VARIABLE = "FLAP_HOME"
RESUME_VARIABLE = "FLAP_RESUME"
FEDERATION_FILE = "federation.yaml"
SITE_FILE = "flap_site.yaml"


class RefusedMessageError(ValueError):
    """The server's message is not what this site accepts."""


def home() -> Path:
    """Folder for runs, site state and demo scans: FLAP_HOME, or `.flap_nvflare` at home."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".flap_nvflare")


def read_federation(fl_ctx: FLContext, changes: Mapping[str, Any] | None = None) -> Federation:
    """The settings of the job on this machine's disk.

    Args:
        fl_ctx: FLARE's context, which names the job.
        changes: settings that came as a component's argument (from a recipe) instead of a file.

    Raises:
        SettingsError: if the file is missing or holds a bad value.
    """
    if changes is not None:
        return Federation.from_dict(changes)
    folder = Path(workspace(fl_ctx).get_app_config_dir(fl_ctx.get_job_id()))
    return Federation.load(folder / FEDERATION_FILE)


def workspace(fl_ctx: FLContext) -> Workspace:
    """The folder layout of this server or site."""
    return fl_ctx.get_engine().get_workspace()


def simulated(fl_ctx: FLContext) -> bool:
    """Whether FLARE's simulator runs this process; a provisioned site never is."""
    return bool(fl_ctx.get_prop(FLContextKey.SIMULATE_MODE, False))


def run_folder(job: str) -> tuple[Path, bool]:
    """The run's durable folder, and whether an interrupted run goes on in it.

    FLAP_RESUME=last takes the job's newest run; any other value names one; without it a
    new folder named by the time is made.

    Raises:
        SettingsError: if the run to go on with does not exist.
    """
    runs = home() / "runs" / job
    wanted = os.environ.get(RESUME_VARIABLE, "")
    if not wanted:
        folder = runs / time.strftime("%Y%m%d-%H%M%S")
        folder.mkdir(parents=True, exist_ok=False)
        return folder, False
    found = sorted(path for path in runs.glob("*") if (path / "run.json").is_file())
    if wanted != "last":
        found = [path for path in found if path.name == wanted]
    if not found:
        raise SettingsError(
            f"{RESUME_VARIABLE}={wanted}: no such run in {runs}; start without {RESUME_VARIABLE}"
        )
    return found[-1], True


def read_site(fl_ctx: FLContext) -> Site:
    """This site's disk, from its own `local/flap_site.yaml`, else from the environment.

    Only in the simulator, and only without both, the demo's synthetic scans are made.

    Raises:
        SettingsError: at a real site without data.
    """
    name = fl_ctx.get_identity_name()
    path = Path(workspace(fl_ctx).get_site_config_dir()) / SITE_FILE
    values = _read_site_file(path) if path.is_file() else {}
    data_root = values.get("data_root") or os.environ.get(DATA_VARIABLE, "")
    synthetic = not data_root and simulated(fl_ctx)
    if synthetic:
        data_root = _demo_scans(name)
    if not data_root:
        raise SettingsError(
            f"site {name} has no data: write 'data_root: FOLDER' into {path}, or set "
            f"{DATA_VARIABLE}"
        )
    return Site(
        name=str(values.get("site") or name),
        data_root=Path(data_root),
        checkpoint=str(values.get("checkpoint") or os.environ.get(CHECKPOINT_VARIABLE, "")),
        checkpoint_sha256=str(values.get("checkpoint_sha256") or ""),
        device=str(values.get("device") or "auto"),
        state_dir=Path(values.get("state_dir") or home() / "state"),
        synthetic=synthetic,
        **{name: switch(values[name]) for name in HARDWARE if name in values},
        processes=values.get("processes", 1),
        cache_gb=_number(path, values, "cache_gb", Site.cache_gb),
        workers=_number(path, values, "workers", Site.workers),
    )


def ranked_here(federation: Federation, site: Site, fl_ctx: FLContext) -> Federation:
    """The settings with this site's rank under the name that it has in its data.

    `site_ranks` names sites as FLARE does; `site` in `flap_site.yaml` may name its data otherwise.
    """
    identity = fl_ctx.get_identity_name()
    if site.name == identity or not federation.site_ranks:
        return federation
    ranks = {**federation.site_ranks, site.name: federation.rank_of(identity)}
    return dataclasses.replace(federation, site_ranks=ranks)


def state_folder(site: Site, run: str) -> Path:
    """The site's own folder for what a run must remember.

    Args:
        site: the site.
        run: the run's name as the server says it, `job/time`.

    Raises:
        RefusedMessageError: if the name is of another form; it may not lead elsewhere.
        ValueError: if the site has no place for it.
    """
    parts = run.split("/")
    if len(parts) != 2 or not all(part and set(part) <= _SAFE for part in parts):
        raise RefusedMessageError(f"run name {run!r} is not of the form job/time")
    if site.state_dir is None:
        raise ValueError(f"site {site.name} has no state_dir")
    folder = site.state_dir / parts[0] / parts[1] / site.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_site_file(path: Path) -> dict[str, Any]:
    allowed = {
        "data_root", "checkpoint", "checkpoint_sha256", "device", "state_dir", "site", "processes",
        "cache_gb", "workers", *HARDWARE,
    }  # fmt: skip
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    unknown = set(values) - allowed if isinstance(values, dict) else {str(values)}
    if unknown:
        raise SettingsError(f"{path}: {sorted(unknown)} not known; expected {sorted(allowed)}")
    return values


def _number(path: Path, values: Mapping[str, Any], name: str, default: _Number) -> _Number:
    try:
        return type(default)(values.get(name, default))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{path}: {name} is {values[name]!r}; give a number") from error


def _demo_scans(site: str) -> str:
    from flap_nvflare.data.phantom import PHANTOM_SITES, write_phantom

    if site not in PHANTOM_SITES:
        raise SettingsError(
            f"site {site} is none of the demo's {tuple(PHANTOM_SITES)}; name one of these, or set "
            f"{DATA_VARIABLE} to real scans"
        )
    return str(write_phantom(home() / "demo_kits", seed=0, sites=[site]))
