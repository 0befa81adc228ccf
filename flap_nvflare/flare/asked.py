"""What a site knows of the task under way, and what its replies are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from flap_nvflare.flare import messages
from flap_nvflare.flare.context import read_bundle, read_limits, read_site
from flap_nvflare.settings import OWN_NETWORK, Federation
from flap_nvflare.site.reasons import SiteError


@dataclass(frozen=True)
class Asked:
    """What a task asked for, as the site received it.

    Attributes:
        task: the task's name.
        task_id: FLARE's id of it.
        federation: the settings that it carries; None if it has none that can be read.
        run: the run's name.
        round_index: the round; -1 if it has none.
        headers: the task's headers.
        models: names of the models to score.
        site: the site's names, in FLARE and in its own table.
        shapes: tensors that may leave, by name.
    """

    task: str
    task_id: str = ""
    federation: Federation | None = None
    run: str = ""
    round_index: int = -1
    headers: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    site: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def shapes_up(
    federation: Federation, rank: int, bundle: Path | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that leaves a site of that rank in any round.

    Of SAM from its modules without memory: no weights are read. Of the network that `bundle`
    names, the site's own config, from the network itself.

    Raises:
        ValueError: if the settings don't go together, or there is no such network.
    """
    from flap_nvflare.bundle.builders import make_parts
    from flap_nvflare.bundle.own_network import build_own_network
    from flap_nvflare.sam.network import Network
    from flap_nvflare.sam.segmenter import blank_segmenter
    from flap_nvflare.sam.tuning import method_named

    parts = make_parts(federation)
    network: Network
    if federation.arch == OWN_NETWORK:
        network = build_own_network(federation, bundle, parts)  # no image goes through it here
    else:
        network = blank_segmenter(
            federation.arch,
            federation.image_size,
            federation.classes,
            rank,
            method_named(federation.method).lora,
            federation.lora_blocks,
            core=parts.trains == "core",
        )
    return {
        name: tuple(parameter.shape)
        for name, parameter in network.named_parameters()
        if parts.up(name)
    }


class TaskReader:
    """Reads tasks as they come in; keeps the shapes of the last settings."""

    def __init__(self) -> None:
        self._known: tuple[Federation, int, dict[str, tuple[int, ...]]] | None = None

    def read(self, data: Shareable, fl_ctx: FLContext) -> Asked:
        """What the task asks for; with settings that can't be read nothing may answer it."""
        headers = _plain_copy(dict(data.get(ReservedHeaderKey.HEADERS) or {}))
        name = str(fl_ctx.get_identity_name())
        known = Asked(
            task=str(fl_ctx.get_prop(FLContextKey.TASK_NAME)),
            task_id=str(fl_ctx.get_prop(FLContextKey.TASK_ID)),
            headers=headers,
        )
        try:
            federation = Federation.from_dict(headers[messages.FEDERATION])
            shapes = self._shapes(federation, federation.rank_of(name), fl_ctx)
        except Exception:  # whatever the server sent
            return known
        round_index, models = _round_and_models(data)
        return replace(
            known,
            federation=federation,
            run=str(headers.get(messages.RUN, "")),
            round_index=round_index,
            models=models,
            site=_names(fl_ctx, name),
            shapes=shapes,
        )

    def _shapes(
        self, federation: Federation, rank: int, fl_ctx: FLContext
    ) -> dict[str, tuple[int, ...]]:
        if self._known is None or self._known[:2] != (federation, rank):
            if federation.arch == OWN_NETWORK and not _allowed(federation, fl_ctx):
                return {}
            self._known = federation, rank, shapes_up(federation, rank, read_bundle(fl_ctx))
        return self._known[2]


def _allowed(federation: Federation, fl_ctx: FLContext) -> bool:
    """Whether the site's limits let the job in: for no other is the site's own code run."""
    limits = read_limits(fl_ctx)
    try:
        if limits is not None:
            limits.check(federation)
    except SiteError:
        return False
    return True


def _names(fl_ctx: FLContext, name: str) -> tuple[str, ...]:
    """The site's name in FLARE, and in its own table of cases if that is another."""
    try:
        return (name, read_site(fl_ctx).name)
    except Exception:  # a site whose own file is at fault sends no scores
        return (name,)


def _round_and_models(data: Shareable) -> tuple[int, tuple[str, ...]]:
    """A task's round, -1 if it has none, and the names of the models that it has to score."""
    try:
        dxo = from_shareable(data)
    except Exception:  # a task without data; FLARE raises several types
        return -1, ()
    if dxo.data_kind == DataKind.COLLECTION:
        return -1, tuple(map(str, dxo.data))
    round_index = dxo.meta.get(messages.ROUND) if dxo.data_kind == DataKind.WEIGHTS else None
    return (round_index if type(round_index) is int else -1), ()


def _plain_copy(value: Any) -> Any:
    """The task's headers as they came: a component may not change what they are compared with."""
    if isinstance(value, dict):
        return {key: _plain_copy(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain_copy(part) for part in value)
    return value


def same(one: object, other: object) -> bool:
    """Equal, type by type all the way down: True is not 1 here, nor a subclass its base."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        pairs = zip(one, other, strict=True) if len(one) == len(other) else [(0, 1)]
        return all(same(a, b) for a, b in pairs)
    return type(one) in (str, int, float, bool, type(None)) and one == other


def is_number(value: object) -> bool:
    """Whether it is a plain, finite number."""
    return type(value) in (int, float) and -1e15 <= value <= 1e15  # type: ignore[operator]


def short(value: object) -> str:
    """At most 80 characters that can forge no line; for the site's own files only."""
    text = repr(value) if isinstance(value, str) else f"of type {type(value).__name__}"
    return "".join(c if c.isprintable() else "?" for c in text[:80])
