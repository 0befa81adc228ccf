"""FLARE's messages as records of the site's audit file."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.task_utils import get_filters
from nvflare.fuel.utils import fobs
from nvflare.private.privacy_manager import Scope

from flap_nvflare.flare.context import workspace
from flap_nvflare.site.audit_log import AuditLog, Record, TensorRecord

_LONGEST = 200  # characters of a reason


class SiteAudit:
    """One job's part of the site's audit file.

    Args:
        fl_ctx: FLARE's context in the job's process.
    """

    def __init__(self, fl_ctx: FLContext) -> None:
        self._log = AuditLog(Path(workspace(fl_ctx).get_root_dir()))
        self._job = str(fl_ctx.get_job_id() or "")

    def write(self, direction: str, outcome: str, **fields: Any) -> None:
        """Writes one record; see `Record`.

        Raises:
            AuditError: if that fails; the message may not pass then.
        """
        reason = str(fields.pop("reason", ""))[:_LONGEST]
        shown = "".join(c if c.isprintable() else "?" for c in reason)
        self._log.append(Record(direction, outcome, self._job, reason=shown, **fields))

    def write_message(self, direction: str, outcome: str, message: Shareable, **fields: Any) -> int:
        """The same for a message, whose bytes, sums and tensors are found here.

        Returns:
            The message's bytes.

        Raises:
            AuditError: if the record can't be written.
            Exception: if the message can't be serialised; it may not pass then, either.
        """
        blob = fobs.dumps(message)
        self.write(
            direction,
            outcome,
            bytes=len(blob),
            sha256=hashlib.sha256(blob).hexdigest(),
            tensors=tensor_records(message),
            **fields,
        )
        return len(blob)


def tensor_records(message: Shareable) -> tuple[TensorRecord, ...]:
    """What a message about weights holds, by name; nothing for any other."""
    try:
        data = dict(from_shareable(message).data)
    except Exception:  # FLARE raises several types for what holds no DXO
        return ()
    return tuple(
        _record(str(name), value)
        for name, value in sorted(data.items(), key=lambda item: str(item[0]))
        if isinstance(value, (torch.Tensor, bytes))
    )


def _record(name: str, value: torch.Tensor | bytes) -> TensorRecord:
    if isinstance(value, bytes):
        digest = hashlib.sha256(value).hexdigest()
        return TensorRecord(name, (len(value),), "bytes", len(value), digest, None)
    plain = value.detach().cpu().contiguous()
    blob = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    norm = float(torch.linalg.vector_norm(plain.double())) if plain.is_floating_point() else None
    return TensorRecord(
        name,
        tuple(plain.shape),
        str(plain.dtype).removeprefix("torch."),
        len(blob),
        hashlib.sha256(blob).hexdigest(),
        norm if norm is not None and math.isfinite(norm) else None,
    )


def result_filters(fl_ctx: FLContext, task: str) -> tuple[str, ...]:
    """Classes of the filters that FLARE ran over the task's result: the site's, then the job's."""
    runner = fl_ctx.get_prop(FLContextKey.RUNNER)
    of_job = getattr(runner, "task_result_filters", None) or {}
    found = get_filters(Scope.TASK_RESULT_FILTERS_NAME, fl_ctx, of_job, task, FilterKey.OUT)
    return tuple(f"{type(one).__module__}.{type(one).__qualname__}" for one in found)
