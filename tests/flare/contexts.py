"""Contexts as FLARE gives them to a component, at a site and at the server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants

from flap_nvflare.flare import messages
from flap_nvflare.flare.job import _JOB, ServerJob


class SiteContext(FLContext):
    """What FLARE gives a component at a site, in a process that is no simulator's."""

    def __init__(self, folder: Path, simulated: bool = False, name: str = "A") -> None:
        super().__init__()
        local = folder / "local"
        local.mkdir(exist_ok=True)
        self.local = local
        self.config = folder / "config"
        workspace = SimpleNamespace(
            get_site_config_dir=lambda: str(local),
            get_app_config_dir=lambda job: str(self.config),
            get_root_dir=lambda: str(folder),
        )
        engine = SimpleNamespace(
            get_workspace=lambda: workspace, fire_event=lambda event_type, fl_ctx: None
        )
        self.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
        self.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=False)
        self.set_prop(FLContextKey.SIMULATE_MODE, simulated, private=True, sticky=False)


class ServerContext(FLContext):
    """What FLARE gives a component at the server, with an open job in a round."""

    def __init__(self, job: ServerJob, round_index: int) -> None:
        super().__init__()
        self.set_prop(_JOB, job, private=True, sticky=True)
        self.set_prop(AppConstants.CURRENT_ROUND, round_index, private=True, sticky=True)

    def peer(self, site: str, claims: str = "") -> ServerContext:
        """This context while a message of `site` is handled, which may claim another name."""
        peer = FLContext()
        peer.set_prop(ReservedKey.IDENTITY_NAME, claims or site, private=False)
        self.set_peer_context(peer)
        for verified in (messages.SENDER, messages.RECEIVER):
            self.set_prop(verified, site, private=True, sticky=False)
        return self
