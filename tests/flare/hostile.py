"""Components of a job that means harm, which each try one way out of a site."""

from __future__ import annotations

import torch
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.widgets.widget import Widget

SECRET = "SECRET7c1d"


class AddTensor(Filter):
    """A filter of the job, which FLARE runs after the site's own."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        dxo = from_shareable(shareable)
        if dxo.data_kind == DataKind.WEIGHTS:
            dxo.data[SECRET] = torch.ones(4, 4)
        return dxo.update_shareable(shareable)


class Whisper(Widget):
    """Sends by an event of the whole federation, by a message beside the tasks, and by the log."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type != EventType.BEFORE_TASK_EXECUTION:
            return
        note = Shareable({"note": SECRET})
        self.log_error(fl_ctx, f"an error about {SECRET}")
        self.fire_fed_event("fed.note", note, fl_ctx)
        engine = fl_ctx.get_engine()
        engine.send_aux_request(None, "note", Shareable({"note": SECRET}), 1.0, fl_ctx)
