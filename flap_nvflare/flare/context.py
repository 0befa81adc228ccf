"""What a component finds around it: the job's settings, the run's folder, the site's disk."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.workspace import Workspace
from nvflare.private.fed.simulator.simulator_server import SimulatorServerEngine

from flap_nvflare.bundle.builders import bundle_file
from flap_nvflare.data.cases import is_synthetic
from flap_nvflare.data.source import SOURCE_FILE
from flap_nvflare.flare.names import plain_name
from flap_nvflare.settings import (
    CHECKPOINT_VARIABLE,
    DATA_VARIABLE,
    HOME_VARIABLE,
    RESUME_VARIABLE,
    SOURCE_VARIABLE,
    Federation,
    MissingDataError,
    SettingsError,
    Site,
    own_home,
)
from flap_nvflare.site.site_file import SITE_FILE, Limits, SiteFile, read_site_file

_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")

FEDERATION_FILE = "federation.yaml"


class RefusedMessageError(ValueError):
    """The server's message is not what this site accepts."""


def home(fl_ctx: FLContext) -> Path:
    """Folder for runs, site state and demo scans.

    FLAP_HOME; without it `flap` in the startup kit of a provisioned server or site, and in the
    simulator, whose workspace is wiped at every start, `.flap_nvflare` at home.
    """
    if os.environ.get(HOME_VARIABLE) or simulated(fl_ctx):
        return own_home()
    return Path(workspace(fl_ctx).get_root_dir()) / "flap"


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


def job_name(fl_ctx: FLContext) -> str:
    """What the job's own meta.json calls it, as FLARE keeps it beside the running job.

    Raises:
        SettingsError: if the file cannot be read, or its name cannot be that of a folder.
    """
    path = Path(workspace(fl_ctx).get_job_meta_path(fl_ctx.get_job_id()))
    try:
        name = json.loads(path.read_text(encoding="utf-8"))[JobMetaKey.JOB_NAME.value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{path}: names no job ({error!r}); give the job a name in its meta.json, or the "
            f"controller a run_name"
        ) from error
    return plain_name(name)


def workspace(fl_ctx: FLContext) -> Workspace:
    """The folder layout of this server or site."""
    return fl_ctx.get_engine().get_workspace()


def simulated(fl_ctx: FLContext) -> bool:
    """Whether FLARE's simulator runs this process; a provisioned server or site never is."""
    # FLARE marks only the sites' contexts; the server's engine tells the same.
    marked = fl_ctx.get_prop(FLContextKey.SIMULATE_MODE, False)
    return bool(marked) or isinstance(fl_ctx.get_engine(), SimulatorServerEngine)


def run_folder(
    fl_ctx: FLContext, job: str, wanted: str, broken_off: Callable[[Path], bool]
) -> tuple[Path, bool]:
    """The run's durable folder, and whether an interrupted run goes on in it.

    Args:
        fl_ctx: FLARE's context.
        job: name of the job.
        wanted: `auto` goes on with the job's newest run at a provisioned server if it was broken
            off, `last` with the newest run, any other value with the run of that name; `new`
            makes a folder named by the time in UTC. FLAP_RESUME, where it is set, comes before it.
        broken_off: whether a run's folder holds what this job can go on with.

    Raises:
        SettingsError: if the job's name is no plain word, or the run to go on with does not exist.
    """
    runs = home(fl_ctx) / "runs" / plain_name(job)
    wanted = os.environ.get(RESUME_VARIABLE) or wanted
    found = sorted(path for path in runs.glob("*") if (path / "run.json").is_file())
    if wanted == "auto":
        goes_on = bool(found) and not simulated(fl_ctx) and broken_off(found[-1])
        wanted = "last" if goes_on else "new"
    if wanted == "new":
        folder = runs / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        folder.mkdir(parents=True, exist_ok=False)
        return folder, False
    if wanted != "last":
        found = [path for path in found if path.name == wanted]
    if not found:
        raise SettingsError(
            f"{RESUME_VARIABLE}={wanted}: no such run in {runs}; start without {RESUME_VARIABLE}"
        )
    return found[-1], True


def read_site(fl_ctx: FLContext) -> Site:
    """This site's disk, from its own `local/flap_site.yaml`, else from the environment.

    Only in the simulator, or where the file says `allow_synthetic: true`, and only without both,
    the demo's synthetic scans are made.

    Raises:
        SettingsError: at a real site without data, or if the file holds a bad value.
    """
    name = fl_ctx.get_identity_name()
    path = site_file(fl_ctx)
    ours = read_site_file(path) if path.is_file() else SiteFile()
    data_root = str(ours.data_root or os.environ.get(DATA_VARIABLE, ""))
    made = not data_root and (simulated(fl_ctx) or ours.allow_synthetic)
    if made:
        data_root = _demo_scans(name, home(fl_ctx))
    if not data_root:
        raise MissingDataError(
            f"site {name} has no data: write 'data_root: FOLDER' into {path}, or set "
            f"{DATA_VARIABLE}"
        )
    return Site(
        name=ours.site or name,
        data_root=Path(data_root),
        checkpoint=ours.checkpoint or os.environ.get(CHECKPOINT_VARIABLE, ""),
        checkpoint_sha256=ours.checkpoint_sha256,
        bundle=read_bundle(fl_ctx),
        state_dir=ours.state_dir or home(fl_ctx) / "state",
        synthetic=is_synthetic(Path(data_root)),
        data_source=None if made else _data_source(fl_ctx),
        **ours.hardware(),
    )


def read_bundle(fl_ctx: FLContext) -> Path | None:
    """This site's own config of another network: code, so a real site's own file must name it.

    In the simulator the environment may as well.

    Raises:
        SettingsError: if the site's file holds a bad value.
    """
    path = site_file(fl_ctx)
    ours = read_site_file(path).bundle if path.is_file() else None
    return bundle_file() if ours is None and simulated(fl_ctx) else ours


def read_limits(fl_ctx: FLContext) -> Limits | None:
    """What a job may ask of this site: as its own file says, without one the plain limits.

    None in the simulator without such a file: there the job and the site are one person's.

    Raises:
        SettingsError: if the file holds a bad value.
    """
    path = site_file(fl_ctx)
    if path.is_file():
        return read_site_file(path).limits
    return None if simulated(fl_ctx) else Limits()


def site_file(fl_ctx: FLContext) -> Path:
    """Where the site's own file lies, or would."""
    return Path(workspace(fl_ctx).get_site_config_dir()) / SITE_FILE


def _data_source(fl_ctx: FLContext) -> Path | None:
    """The site's own file of code, from its kit; in the simulator from the environment as well."""
    ours = site_file(fl_ctx).parent / "custom" / SOURCE_FILE
    if ours.is_file():
        return ours
    named = os.environ.get(SOURCE_VARIABLE, "") if simulated(fl_ctx) else ""
    return Path(named) if named else None


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


def _demo_scans(site: str, folder: Path) -> str:
    from flap_nvflare.data.phantoms import KINDS, Phantoms, phantom_sites, write_phantoms

    sites = {kind: phantom_sites(Phantoms(kind=kind)) for kind in KINDS}
    for kind, names in sites.items():
        if site in names:
            return str(write_phantoms(folder / f"demo_{kind}", Phantoms(kind=kind), only=[site]))
    known = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in sites.items())
    raise SettingsError(
        f"site {site} is none of the demo's ({known}); name one of these, or set "
        f"{DATA_VARIABLE} to real scans"
    )
