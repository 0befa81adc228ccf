"""Right updates of small federations, and what hypothesis makes of them to be refused."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from contexts import ServerContext
from hypothesis import assume
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils import fobs

from flap_nvflare.adapter.container import CodecError
from flap_nvflare.adapter.links import Downlink, Uplink, arrived
from flap_nvflare.adapter.parcel import CONTROL
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.aggregation.server import ServerState
from flap_nvflare.flare import messages
from flap_nvflare.flare.aggregator import FlapAggregator
from flap_nvflare.flare.coding import DecodeUpdate
from flap_nvflare.flare.job import ServerJob
from flap_nvflare.flare.run import RunFolder
from flap_nvflare.sam.tuning import Parts
from flap_nvflare.settings import Federation

SITES = ("A", "B")
HOSTILE = "C"
ROUND = 1
FROZEN = "image_encoder.blocks.0.attn.qkv.weight"
A, B = (f"image_encoder.blocks.0.attn.qkv.q.lora_{factor}" for factor in "ab")
SHAPES = {A: (2, 6), B: (5, 2), "mask_decoder.mask_tokens.weight": (3, 4)}
NAMES = sorted(SHAPES)
UPLOAD = ("difference", "top_k=0.5", "int4", "deflate")
KINDS = ("plain", "coded", "scaffold")


def tensors(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


SPEC = UpdateSpec.of(tensors(0), "flap", 2, "0" * 64)


class Server:
    """An aggregator behind its filter, in a round of one kind of federation."""

    def __init__(self, kind: str, folder: Path) -> None:
        settings: dict[str, Any] = {
            "plain": {},
            "coded": {"upload": UPLOAD},
            "scaffold": {"optimizer": "scaffold", "rule": "mean"},
        }[kind]
        self.job = ServerJob(
            federation=Federation(rank=2, rounds=3, cross_site="global", **settings),
            folder=RunFolder(folder),
            spec=SPEC,
            frozen={FROZEN},
            fixed={},
            parts=Parts("flap"),
            state=ServerState(tensors(0)),
            sites=(*SITES, HOSTILE),
            downlink=Downlink((), tensors(0)),
        )
        self.job.quorum = len(SITES)
        self.job.begin_round(ROUND)
        self.aggregator = FlapAggregator()

    def accept(self, site: str, message: Any) -> bool:
        """What FLARE does with a message of a site."""
        context = ServerContext(self.job, ROUND).peer(site)
        return self.aggregator.accept(DecodeUpdate().process(message, context), context)

    def aggregate(self) -> dict[str, torch.Tensor]:
        result = self.aggregator.aggregate(ServerContext(self.job, ROUND))
        return dict(messages.read_dxo(result, DataKind.WEIGHTS).data)


@dataclass
class Draft:
    """A message that is still to be spoilt."""

    kind: str
    data: Any
    meta: Any
    dxo_kind: Any = DataKind.WEIGHTS
    instead: list[Any] = field(default_factory=list)

    def message(self) -> Shareable:
        """As FLARE hands it to the server; what can't be serialised can't come over the wire."""
        if self.instead:
            found = Shareable()
            found["DXO"] = self.instead[0]
        else:
            found = messages.weights_dxo({}, SPEC, ROUND).to_shareable()
            found["DXO"].update(kind=self.dxo_kind, data=self.data, meta=self.meta)
        try:
            found = fobs.loads(fobs.dumps(found))
        except Exception:
            return found
        return found


def right(kind: str, site: str) -> Draft:
    """An update that counts."""
    update = tensors(ord(site))
    spec, data = SPEC.to_dict(), dict[str, Any](update)
    if kind == "coded":
        spec["shapes"] = {}
        data = {messages.CODED: coded(site)}
    elif kind == "scaffold":
        data |= {CONTROL + name: tensor / 9 for name, tensor in update.items()}
    report = {"steps": 3, "loss": 0.5, "cases": 4, "dice": {"kidney": 0.5, "mean": 0.5}}
    meta = {messages.SPEC: spec, messages.ROUND: ROUND, messages.REPORT: report}
    return Draft(kind, data, {**meta, messages.WEIGHT: float(ord(site) % 5 + 1)})


@cache
def coded(site: str) -> bytes:
    """The update of a site as its filter codes it."""
    blob, _ = Uplink(UPLOAD).send(tensors(ord(site)), tensors(0), False)
    assert blob is not None
    return blob


@cache
def honest(kind: str) -> dict[str, torch.Tensor]:
    """What the honest sites alone make of the round."""
    server = Server(kind, Path(mkdtemp()))
    assert all(server.accept(site, right(kind, site).message()) for site in SITES)
    return server.aggregate()


Fault = Callable[[Draft], None]
GARBAGE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(),
        st.text(max_size=6), st.binary(max_size=6), st.builds(object),
        st.sampled_from([np.ones(3, np.float32), torch.ones(2), torch.tensor(math.nan)]),
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    | st.tuples(inner, inner),
    max_leaves=8,
)  # fmt: skip


def deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


NESTED = st.one_of(GARBAGE, st.builds(deep, st.sampled_from([50, 300, 600, 3000])))


def _field(name: str, value: Any) -> Fault:
    return lambda draft: draft.meta.update({name: value})


@st.composite
def weights(draw: st.DrawFn) -> Fault:
    value = draw(st.floats(max_value=0) | st.floats(min_value=1.0001e6) | st.just(1e-300) | NESTED)
    assume(type(value) not in (int, float) or not 1e-290 < value <= 1e6)
    return _field(messages.WEIGHT, value)


@st.composite
def rounds(draw: st.DrawFn) -> Fault:
    value = draw(st.integers(-5, 5) | st.just(1.0) | st.just(True) | st.just("1") | NESTED)
    assume(type(value) is not int or value != ROUND)
    return _field(messages.ROUND, value)


@st.composite
def specs(draw: st.DrawFn) -> Fault:
    name, value = draw(
        st.one_of(
            st.tuples(st.just("method"), st.sampled_from(["full", "FLAP", "$import os"])),
            st.tuples(st.just("rank"), st.integers(3, 2**40)),
            st.tuples(st.just("base_sha256"), st.text("0123456789abcdef", max_size=63)),
            st.tuples(st.sampled_from(["method", "base_sha256"]), NESTED),
            st.tuples(st.text(max_size=5), NESTED),
        )
    )
    assume(SPEC.to_dict().get(name) != value)

    def spoil(draft: Draft) -> None:
        whole = {**SPEC.to_dict(), "shapes": {}} if draft.kind == "coded" else SPEC.to_dict()
        draft.meta[messages.SPEC] = {**whole, name: value}

    return spoil


@st.composite
def shapes(draw: st.DrawFn) -> Fault:
    """A spec at odds with its tensors; a coded message leaves them out."""
    sizes = st.lists(st.integers(-2, 2**40), max_size=4)
    value = draw(st.dictionaries(st.sampled_from([*NAMES, FROZEN]), sizes, max_size=4) | NESTED)
    dtype = draw(st.sampled_from(["float32", "float16", "load", "Tensor", "$1"]))

    def spoil(draft: Draft) -> None:
        assume(draft.kind != "coded")
        draft.meta[messages.SPEC] = {**SPEC.to_dict(), "shapes": value, "dtype": dtype}

    return spoil


@st.composite
def reports(draw: st.DrawFn) -> Fault:
    steps = st.integers(max_value=0, min_value=-(2**63)) | st.integers(100_001, 2**63) | NESTED
    number = st.sampled_from([math.nan, math.inf, "1", None, True, [1.0]])
    value = draw(
        st.one_of(
            st.fixed_dictionaries({"steps": steps.filter(lambda n: n not in range(1, 100_001))}),
            st.fixed_dictionaries({"steps": st.just(3), "loss": number}),
            st.fixed_dictionaries({"steps": st.just(3), "cases": number}),
            st.fixed_dictionaries({"steps": st.just(3), "timings": st.just({"scan": 1.0})}),
            st.fixed_dictionaries({"steps": st.just(3), "synthetic": st.integers()}),
            st.fixed_dictionaries(
                {"steps": st.just(3), "dice": st.sampled_from([{"mean": 2.0}, {"x": 0.5}, 1])}
            ),
            st.fixed_dictionaries({"steps": st.just(3), "privacy": st.just({"epsilon": 0.1})}),
        )
        | NESTED.filter(lambda value: not (isinstance(value, Mapping) and "steps" in value))
    )
    return _field(messages.REPORT, value)


@st.composite
def missing(draw: st.DrawFn) -> Fault:
    gone = draw(st.sampled_from([messages.SPEC, messages.ROUND, messages.WEIGHT, messages.REPORT]))
    return lambda draft: draft.meta.pop(gone, None)


@st.composite
def metas(draw: st.DrawFn) -> Fault:
    value = draw(NESTED)
    return lambda draft: setattr(draft, "meta", value)


@st.composite
def kinds(draw: st.DrawFn) -> Fault:
    value = draw(st.sampled_from(["METRICS", "COLLECTION", "WEIGHT_DIFF", "weights"]) | NESTED)
    return lambda draft: setattr(draft, "dxo_kind", value)


@st.composite
def bodies(draw: st.DrawFn) -> Fault:
    value = draw(NESTED | st.builds(lambda: DXO(DataKind.METRICS, {"a": 1})))
    if draw(st.booleans()):
        return lambda draft: draft.instead.append(value)
    return lambda draft: setattr(draft, "data", value)


def _odd_tensor(name: str, draw: st.DrawFn) -> Any:
    shape = SHAPES.get(name, (2,))
    spoilt = torch.ones(shape)
    spoilt.view(-1)[draw(st.integers(0, spoilt.numel() - 1))] = draw(
        st.sampled_from([math.nan, math.inf, -math.inf, 1e5, -3e38])
    )
    value = draw(
        st.one_of(
            st.just(spoilt),
            st.builds(torch.ones, st.lists(st.integers(0, 3), max_size=4)),
            st.builds(
                lambda dtype: torch.ones(shape, dtype=dtype),
                st.sampled_from([torch.float64, torch.float16, torch.int32, torch.bool]),
            ),
            st.just(np.ones(shape, np.float32)),
            NESTED,
        )
    )
    fits = (
        type(value) is torch.Tensor
        and value.dtype == torch.float32
        and tuple(value.shape) == shape
        and bool((value.abs() < 1e4).all())
    )
    assume(not fits)
    return value


@st.composite
def values(draw: st.DrawFn) -> Fault:
    name = draw(st.sampled_from(NAMES))
    value, before = _odd_tensor(name, draw), draw(st.sampled_from(["", CONTROL]))

    def spoil(draft: Draft) -> None:
        # In a coded message this is a tensor beside the bytes, in a plain one a control too many.
        draft.data[before + name] = value

    return spoil


@st.composite
def names(draw: st.DrawFn) -> Fault:
    if draw(st.booleans()):
        gone = draw(st.sampled_from(NAMES))

        def drop(draft: Draft) -> None:
            draft.data.pop(gone, None)
            draft.data.pop(messages.CODED, None)

        return drop
    key = draw(
        st.sampled_from([FROZEN, CONTROL + FROZEN, CONTROL, "sealed.weight", "../" + A])
        | st.sampled_from([A.replace("lora", "offset"), CONTROL + A.upper(), A + "\n", "@net"])
        | st.text(max_size=5)
        | st.integers(-9, 9)
        | st.binary(max_size=3)
        | st.none()
    )
    return lambda draft: draft.data.update({key: torch.ones(2)})


@st.composite
def damage(draw: st.DrawFn) -> Fault:
    """Coded bytes that are cut off, changed, too many, a bomb, or of another message."""
    way = draw(st.sampled_from(["cut", "change", "more", "bomb", "garbage", "other"]))
    place, byte = draw(st.integers(0, len(coded(HOSTILE)) - 1)), draw(st.integers(1, 255))
    blob = coded(HOSTILE)
    if way == "cut":
        value: Any = blob[:place]
    elif way == "change":
        value = blob[:place] + bytes([blob[place] ^ byte]) + blob[place + 1 :]
    elif way == "more":
        value = blob + draw(st.binary(min_size=1, max_size=9))
    elif way == "bomb":
        length = draw(st.sampled_from([10**4, 10**6]))
        value = zlib.compress(zlib.decompress(blob) + bytes(length))
    elif way == "other":
        start = tensors(draw(st.integers(1, 9)))
        value, _ = Uplink(UPLOAD).send(tensors(4), start, False)
    else:
        value = draw(st.binary(max_size=200) | NESTED)
    try:
        arrived(value, UPLOAD, "up", tensors(0), SHAPES)
    except CodecError:
        pass
    else:
        assume(False)  # a bit that says nothing, as in the level that zlib's header names
    return lambda draft: draft.data.update({messages.CODED: value})


# Those that replace a whole part come last: the others need it to be there.
FAULTS = st.tuples(
    st.lists(
        st.one_of(weights(), rounds(), specs(), shapes(), reports(), missing())
        | st.one_of(values(), names(), damage()),
        min_size=1,
        max_size=2,
    ),
    st.lists(st.one_of(metas(), kinds(), bodies()), max_size=1),
).map(lambda parts: [*parts[0], *parts[1]]) | st.lists(
    st.one_of(metas(), kinds(), bodies()), min_size=1, max_size=1
)
