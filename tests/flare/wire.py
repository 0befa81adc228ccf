"""One federation's server and sites, with the filters of the job as FLARE calls them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contexts import ServerContext, SiteContext
from nvflare.apis.dxo import DataKind
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils import fobs
from torch import Tensor

from flap_nvflare.adapter.parcel import Parcel
from flap_nvflare.adapter.update import content_sha256
from flap_nvflare.flare import messages
from flap_nvflare.flare.aggregator import FlapAggregator
from flap_nvflare.flare.coding import (
    DecodeAdapter,
    DecodeUpdate,
    EncodeAdapter,
    EncodeUpdate,
    PrivacyFilter,
)
from flap_nvflare.flare.filters import AdapterOnlyFilter
from flap_nvflare.flare.job import ServerJob, _first_job
from flap_nvflare.flare.run import RunFolder
from flap_nvflare.settings import Federation

SETTINGS = Federation(base="random", image_size=32, rank=2, rounds=4)
UPLOAD = ("difference", "feedback", "top_k=0.1", "int4", "deflate")
DOWNLOAD = ("difference", "top_k=0.1", "int4", "deflate")
CODED: Mapping[str, Any] = {"upload": UPLOAD, "download": DOWNLOAD}
SITES = ("A", "B")
Tensors = dict[str, Tensor]


def over_the_wire(message: Shareable) -> Shareable:
    """The message as FLARE serialises it and reads it again."""
    found: Shareable = fobs.loads(fobs.dumps(message))
    return found


class Wire:
    """Messages between a server and sites A and B, whose disks lie in `folder`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.federation = folder, dataclasses.replace(SETTINGS, **settings)
        self.job: ServerJob = _first_job(self.federation, "fed_kits", SITES)
        self.job.folder = RunFolder(folder / "fed_kits" / "20260101-000000")
        self.job.folder.path.mkdir(parents=True)
        self.aggregator = FlapAggregator()
        self.round_index = 0
        self.site_contexts = {}
        for name in SITES:
            disk = folder / name
            disk.mkdir()
            self.site_contexts[name] = context = SiteContext(disk, name=name)
            (context.local / "flap_site.yaml").write_text(
                f"data_root: {disk}\nstate_dir: {disk}\n", encoding="utf-8"
            )
        self.job.begin_round(0)

    @property
    def server(self) -> ServerContext:
        return ServerContext(self.job, self.round_index)

    def state(self, site: str) -> Path:
        """The site's folder for this run."""
        return self.folder / site / self.job.run / site

    def task(self) -> Shareable:
        """The round's task before any filter, one for all sites."""
        data = self.job.state.parcel().flat()
        task = messages.weights_dxo(data, self.job.spec, self.round_index).to_shareable()
        task.set_header(messages.FEDERATION, self.federation.to_dict())
        task.set_header(messages.RUN, self.job.run)
        task.set_header(messages.TURNED, self.job.state.turned)
        task.set_header(messages.FIXED, content_sha256(self.job.fixed))
        return task

    def sent_down(self, site: str) -> Shareable:
        """What leaves the server for a site."""
        return EncodeAdapter().process(self.task(), self.server.peer(site))

    def received(self, site: str, message: Shareable | None = None) -> Shareable:
        """What reaches a site's executor."""
        message = over_the_wire(self.sent_down(site) if message is None else message)
        context = self.site_contexts[site]
        named = self.federation.parameters
        gate = AdapterOnlyFilter(self.federation.method, offset=True, parameters=named)
        return DecodeAdapter().process(gate.process(message, context), context)

    def reply(
        self, site: str, task: Shareable, update: Tensors, control: Tensors | None = None
    ) -> Shareable:
        """A site's reply as its executor makes it, before any filter."""
        data = Parcel(update, {}, control or {}).flat()
        spec = self.job.expected(site, self.round_index)
        meta = {messages.WEIGHT: 2.0, messages.REPORT: {"steps": 3, "loss": 0.5}}
        reply = messages.weights_dxo(data, spec, self.round_index, **meta).to_shareable()
        messages.hand_on(task, reply)
        return reply

    def sent_up(self, site: str, reply: Shareable) -> Shareable:
        """What leaves a site."""
        context = self.site_contexts[site]
        gate = AdapterOnlyFilter(self.federation.method, parameters=self.federation.parameters)
        for one in (PrivacyFilter(), EncodeUpdate(), gate):
            reply = one.process(reply, context)
        return reply

    def accept(self, site: str, message: Shareable) -> bool:
        """Whether the server counts what a site has sent."""
        context = self.server.peer(site)
        decoded = DecodeUpdate().process(over_the_wire(message), context)
        return self.aggregator.accept(decoded, context)

    def answer(self, site: str, update: Tensors, task: Shareable | None = None) -> Shareable:
        """A site's whole part in the round; returns the message that left it."""
        task = self.received(site) if task is None else task
        message = self.sent_up(site, self.reply(site, task, update))
        assert self.accept(site, message), self.job.refused
        return message

    def next_round(self) -> None:
        """Aggregates, and begins the next round."""
        self.aggregator.aggregate(self.server)
        self.aggregator.reset(self.server)
        self.round_index += 1
        self.job.begin_round(self.round_index)


def weights(message: Shareable) -> dict[str, Any]:
    """The data of a message about weights."""
    return dict(messages.read_dxo(message, DataKind.WEIGHTS).data)
