"""DXO filters that make messages small and private: one at each end of each way.

| filter | where | what |
|---|---|---|
| `EncodeAdapter` | server, task data | an adapter becomes coded bytes, by `download` |
| `DecodeAdapter` | site, task data | and an adapter again |
| `PrivacyFilter` | site, results | clips the update's change and adds noise, by `dp_...` |
| `EncodeUpdate` | site, results | an update becomes coded bytes, by `upload` |
| `DecodeUpdate` | server, results | and an update again |

Which stages there are is the federation's choice, see `adapter.stages`; without any the filters
let messages pass. What a site must remember (the adapter that it holds, what its coding has lost
so far) is in its files, by round, since FLARE's simulator may start a process for every task.

At a site `PrivacyFilter` comes before `EncodeUpdate`: what is coded is private already. The gate
that looks at names, `AdapterOnlyFilter`, has the last word: it reads the names in coded bytes.
"""

from __future__ import annotations

from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from flap_nvflare.adapter.container import CodecError
from flap_nvflare.adapter.factors import of_rank
from flap_nvflare.adapter.links import Uplink, arrived
from flap_nvflare.adapter.parcel import Parcel, parcel
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.flare import messages
from flap_nvflare.flare.context import ranked_here, read_federation, read_site, state_folder
from flap_nvflare.flare.error_log import tells_why
from flap_nvflare.flare.held import HeldAdapter
from flap_nvflare.flare.job import server_job
from flap_nvflare.flare.privacy import release
from flap_nvflare.flare.sizes import size_fault
from flap_nvflare.settings import Federation, SettingsError, Site


class EncodeAdapter(Filter):
    """At the server: codes the adapter, and books the bytes of what goes to each site."""

    def __init__(self) -> None:
        super().__init__()
        # All sites get one of at most two messages of a round: each is measured once.
        self._measured: dict[tuple[int, bytes | None], int] = {}

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The message for the site that asked; the one given, which all share, stays as it is."""
        job = server_job(fl_ctx)
        site = str(fl_ctx.get_prop(messages.RECEIVER))
        dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
        message = job.downlink.message(site)
        if message is not None:
            _, offset, control = parcel(dict(dxo.data))
            data = {messages.CODED: message, **Parcel({}, offset, control).flat()}
            shareable = _with(shareable, data, _bare(dxo.meta))
        round_index = int(dxo.meta[messages.ROUND])
        kind = round_index, message
        if kind not in self._measured:
            self._measured = {key: n for key, n in self._measured.items() if key[0] == round_index}
            self._measured[kind] = messages.serialised_bytes(shareable)
        job.ledger.add(round_index, site, "down", self._measured[kind])
        return shareable


class DecodeAdapter(Filter):
    """At a site: the adapter of a coded message; remembers what the site then holds."""

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The message with plain tensors.

        Raises:
            CodecError: if it is damaged, or a difference to an adapter that is not held here; the
                server then sends the next one whole.
        """
        if not _is_weights(shareable):
            return shareable
        federation = Federation.from_dict(shareable.get_header(messages.FEDERATION) or {})
        if not _remembers(federation):
            return shareable
        dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
        round_index = dxo.meta[messages.ROUND]
        if type(round_index) is not int or not 0 <= round_index < federation.rounds:
            raise CodecError(f"round {repr(round_index)[:80]} is none of {federation.rounds}")
        held = _held(shareable, federation, fl_ctx)
        message, (tensors, offset, control) = _opened(dxo)
        if message is not None:
            before = held.before(round_index)
            tensors = arrived(message, federation.download, "down", before, before)
            meta = {**dxo.meta, messages.SPEC: _filled(dxo.meta[messages.SPEC], tensors)}
            shareable = _with(shareable, Parcel(tensors, offset, control).flat(), meta)
        held.keep(round_index, tensors)
        return shareable


class PrivacyFilter(Filter):
    """At a site: the Gaussian mechanism on what has changed, and the site's count of messages.

    Args:
        clip: the largest `dp_clip` that this site accepts; 0 takes the settings of the job's own
            `federation.yaml` at this site, if it has one.
        noise: the smallest `dp_noise` that it accepts.
    """

    def __init__(self, clip: float = 0.0, noise: float = 0.0) -> None:
        super().__init__()
        self.clip = clip
        self.noise = noise

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The reply with what may be released in the place of what was trained."""
        task = messages.handed_on(shareable)
        if not _is_weights(shareable) or task is None:
            return shareable
        federation = task.federation
        self._require(federation, fl_ctx)
        if not federation.dp_clip:
            return shareable
        dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
        if "privacy" in dxo.meta.get(messages.REPORT, {}):
            return shareable  # by the same filter in the site's own policy, which comes first
        tensors, _, control = parcel(dict(dxo.data))
        if control:
            raise ContentBlockedException("control variates would leave without noise")
        site = read_site(fl_ctx)
        start = _start(site, task, ranked_here(federation, site, fl_ctx), tensors)
        sent, said = release(federation, site, task.round_index, start, tensors)
        report = {**dxo.meta.get(messages.REPORT, {}), "privacy": said}
        return _with(shareable, sent, {**dxo.meta, messages.REPORT: report})

    def _require(self, asked: Federation, fl_ctx: FLContext) -> None:
        """A server may ask for more privacy than this site's own settings, never for less."""
        clip, noise = self.clip, self.noise
        if clip == 0.0:
            try:
                ours = read_federation(fl_ctx)
            except SettingsError:  # a job that brings no such file
                return
            clip, noise = ours.dp_clip, ours.dp_noise
        if clip > 0.0 and not (0.0 < asked.dp_clip <= clip and asked.dp_noise >= noise):
            raise ContentBlockedException(
                f"the server asks for dp_clip {asked.dp_clip} and dp_noise {asked.dp_noise}; this "
                f"site sends with at most {clip} and at least {noise}"
            )


class EncodeUpdate(Filter):
    """At a site: codes the update; remembers what its coding has lost."""

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The reply with coded bytes, without the headers that were only for filters here."""
        task = messages.handed_on(shareable)
        messages.take_off(shareable)
        if not _is_weights(shareable) or task is None:
            return shareable
        dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
        if task.federation.dp_clip and "privacy" not in dxo.meta.get(messages.REPORT, {}):
            raise ContentBlockedException(
                "dp_clip is set, but no PrivacyFilter has made the update private; put it before "
                "this filter"
            )
        if not task.federation.upload:
            return shareable
        tensors, _, control = parcel(dict(dxo.data))
        site = read_site(fl_ctx)
        held = HeldAdapter(state_folder(site, task.run), task.federation, site)
        link = Uplink(task.federation.upload)
        link.restore(held.residue(task.round_index))
        start = _start(site, task, ranked_here(task.federation, site, fl_ctx), tensors)
        message, _ = link.send(tensors, start, task.turned)
        held.keep_residue(task.round_index, link.stored())
        data = {messages.CODED: message, **Parcel({}, {}, control).flat()}
        return _with(shareable, data, _bare(dxo.meta))


class DecodeUpdate(Filter):
    """At the server: the update of a coded message; one that can't be read stays as it came."""

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The message with plain tensors and the bytes that it had; the aggregator judges it."""
        shareable.set_header(messages.RECEIVED, messages.serialised_bytes(shareable))
        shareable.set_header(messages.FAULT, None)  # a peer may have set its own
        if not _is_weights(shareable):
            return shareable
        job = server_job(fl_ctx)
        try:
            dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
            message, (tensors, offset, control) = _opened(dxo)
            if message is None:
                return shareable
            if tensors or offset or not job.federation.upload:
                raise CodecError("coded bytes that nobody asked for, or tensors beside them")
            claimed = str(fl_ctx.get_peer_context().get_identity_name())
            expected = job.expected(claimed, int(dxo.meta[messages.ROUND]))
            if fault := size_fault(messages.received_bytes(shareable), expected, bool(control)):
                raise CodecError(fault)
            start = of_rank(job.downlink.held, expected.rank)
            tensors = arrived(message, job.federation.upload, "up", start, expected.shapes)
            meta = {**dxo.meta, messages.SPEC: _filled(dxo.meta[messages.SPEC], tensors)}
            decoded = _with(shareable, Parcel(tensors, {}, control).flat(), meta)
        except Exception as error:  # whatever a peer sends, the aggregator names the refusal
            shareable.set_header(messages.FAULT, f"{type(error).__name__}: {error}"[:200])
            return shareable
        return decoded


def _is_weights(shareable: Shareable) -> bool:
    if shareable.get_return_code(ReturnCode.OK) != ReturnCode.OK:
        return False
    try:
        return bool(from_shareable(shareable).data_kind == DataKind.WEIGHTS)
    except Exception:  # FLARE raises several types for what holds no DXO
        return False


def _remembers(federation: Federation) -> bool:
    """Whether a filter on the way up needs to know what the site started from."""
    return bool(federation.upload or federation.download or federation.dp_clip)


def _held(shareable: Shareable, federation: Federation, fl_ctx: FLContext) -> HeldAdapter:
    site = read_site(fl_ctx)
    folder = state_folder(site, str(shareable.get_header(messages.RUN) or ""))
    return HeldAdapter(folder, federation, site)


def _start(
    site: Site, task: messages.Task, federation: Federation, tensors: dict[str, Any]
) -> dict[str, Any]:
    """What the site started the round from, by the names and at the rank of its update."""
    held = HeldAdapter(state_folder(site, task.run), federation, site).of(task.round_index)
    ours = of_rank(held, federation.rank_of(site.name))
    return {name: ours[name] for name in tensors}


def _opened(dxo: DXO) -> tuple[Any, Parcel]:
    """The coded bytes, None if there are none, and what goes beside them."""
    data = dict(dxo.data)
    return data.pop(messages.CODED, None), parcel(data)


def _with(shareable: Shareable, data: dict[str, Any], meta: dict[str, Any]) -> Shareable:
    """The message with another body; the one given stays as it is."""
    changed = Shareable()
    changed.update(shareable)
    return DXO(DataKind.WEIGHTS, data=data, meta=meta).update_shareable(changed)


def _bare(meta: dict[str, Any]) -> dict[str, Any]:
    """Meta whose spec leaves out the shapes, which the receiver knows and fills in."""
    return {**meta, messages.SPEC: {**meta[messages.SPEC], "shapes": {}}}


def _filled(spec: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    bare = UpdateSpec.from_dict(spec)
    found = UpdateSpec.of(tensors, bare.method, bare.rank, bare.base_sha256)
    return found.to_dict()
