"""Puts the slices of a volume together again and scores it as soon as it is whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys

from flap_nvflare.training.errors import Stopped
from flap_nvflare.training.metrics import score_case
from flap_nvflare.training.scores import CaseScore

# Logits at native resolution that are held at once, in numbers: 64 MB.
_LOGITS = 2**24


class VolumeScorer:
    """Handler of MONAI's evaluator over the batches of `VolumeBatches`.

    Only the class indices of one volume are held, never its logits.

    Args:
        classes: foreground classes C.
        should_stop: asked before every batch.
        tolerance: mm for the surface figures, None to leave them out.

    Attributes:
        scores: the volumes scored so far.
        stopped: whether the pass was ended as asked.
    """

    def __init__(
        self, classes: int, should_stop: Callable[[], bool], tolerance: float | None = None
    ) -> None:
        self.classes = classes
        self.should_stop = should_stop
        self.tolerance = tolerance
        self.scores: list[CaseScore] = []
        self.stopped = False
        self._slices: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Registers the handlers with an evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._ask)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _ask(self, engine: Engine) -> None:
        # Terminated and not raised: ignite logs every exception as an error.
        if self.should_stop():
            self.stopped = True
            engine.terminate()

    def require_whole(self) -> None:
        """Raises Stopped if the pass was ended before its last batch."""
        if self.stopped:
            raise Stopped(f"stopped as asked after scoring {len(self.scores)} cases")

    def __call__(self, engine: Engine) -> None:
        """Takes in the logits (n, C+1, S, S) of the next n slices of the present volume."""
        volume = engine.state.batch["volume"]
        slices, *size = volume.shape
        self._slices.extend(native_masks(engine.state.output[CommonKeys.PRED], tuple(size)))
        if len(self._slices) == slices:
            self.scores.append(
                score_case(
                    volume.name,
                    torch.stack(self._slices),
                    volume.native_label(),
                    self.classes,
                    volume.spacing,
                    self.tolerance,
                )
            )
            self._slices = []


def native_masks(logits: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Class indices (n, H, W) uint8 on the CPU from logits (n, C+1, S, S).

    The logits are resized, not the masks, so that a border falls between pixels. Of equal logits
    the first class counts.
    """
    at_once = max(1, _LOGITS // (logits.shape[1] * size[0] * size[1]))
    masks = []
    for part in logits.split(at_once):
        resized = torch.nn.functional.interpolate(
            part.float(), size=size, mode="bilinear", align_corners=False
        )
        # Not argmax, which takes 30 times as long on a CPU over a dimension that is not the last.
        masks.append(resized.max(dim=1).indices.to(torch.uint8).cpu())
    return torch.cat(masks)
