"""One hostile site of six: refused, named, and the result is that of the other five."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contexts import ServerContext
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.aggregation.server import ServerState
from flap_nvflare.flare import messages
from flap_nvflare.flare.aggregator import FlapAggregator, QuorumError
from flap_nvflare.flare.job import ServerJob, keep_best, quorum_of
from flap_nvflare.flare.run import BEST, RunFolder
from flap_nvflare.sam.tuning import Parts
from flap_nvflare.settings import Federation, SettingsError

SITES = "ABCDEF"
FROZEN = "image_encoder.blocks.0.attn.qkv.weight"
A, B = (f"image_encoder.blocks.0.attn.qkv.q.lora_{factor}" for factor in "ab")
HEAD = "mask_decoder.mask_tokens.weight"


def tensors(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {A: (2, 6), B: (5, 2), HEAD: (3, 4)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


SPEC = UpdateSpec.of(tensors(0), "flap", 2, "0" * 64)


class Server:
    """An aggregator with the context that FLARE's server would give it, at round 1."""

    def __init__(self, folder: Path, quorum: int = 5, **settings: object) -> None:
        folder.mkdir()
        self.job = ServerJob(
            federation=Federation(**{"rank": 2, "rounds": 2, **settings}),
            folder=RunFolder(folder),
            spec=SPEC,
            frozen={FROZEN},
            fixed={},
            parts=Parts("flap"),
            state=ServerState(tensors(0)),
            sites=tuple(SITES),
        )
        self.job.quorum = quorum
        self.job.begin_round(1)
        self.aggregator = FlapAggregator()
        self.context = ServerContext(self.job, 1)

    def accept(self, site: str, message: Shareable) -> bool:
        # What the message itself says of its sender does not count.
        return self.aggregator.accept(message, self.context.peer(site, claims="A"))

    def aggregate(self) -> dict[str, torch.Tensor]:
        result = self.aggregator.aggregate(self.context)
        return messages.read_dxo(result, DataKind.WEIGHTS).data


STEPS = {"steps": 3}


def message(
    site: str, change: Callable[[dict], object] = lambda data: None, **meta: object
) -> Shareable:
    data = tensors(ord(site))
    change(data)
    values = {messages.WEIGHT: float(ord(site) % 5 + 1), messages.REPORT: STEPS, **meta}
    round_index = values.pop(messages.ROUND, 1)
    return messages.weights_dxo(data, SPEC, round_index, **values).to_shareable()


def faulty() -> Shareable:
    """A message that a filter before the aggregator could not read."""
    found = message("F")
    found.set_header(messages.FAULT, "CodecError: the message is cut off")
    return found


HOSTILE = {
    "NaN": (message("F", lambda data: data[HEAD].view(-1)[3:4].fill_(math.nan)), HEAD),
    "infinite": (message("F", lambda data: data[A].view(-1)[0:1].fill_(math.inf)), A),
    "wrong shape": (message("F", lambda data: data.update({B: torch.zeros(5, 3)})), B),
    "wrong dtype": (message("F", lambda data: data.update({B: torch.zeros(5, 2).half()})), B),
    "extra key": (message("F", lambda data: data.update(scan=torch.zeros(2))), "scan"),
    "frozen key": (message("F", lambda data: data.update({FROZEN: torch.zeros(5, 6)})), FROZEN),
    "missing key": (message("F", lambda data: data.pop(HEAD)), HEAD),
    "old round": (message("F", **{messages.ROUND: 0}), ""),
    "weight 1e12": (message("F", **{messages.WEIGHT: 1e12}), ""),
    "negative weight": (message("F", **{messages.WEIGHT: -1.0}), ""),
    "vanishing weight": (message("F", **{messages.WEIGHT: 1e-300}), ""),
    "false Dice": (message("F", **{messages.REPORT: {**STEPS, "dice": {"mean": 1e9}}}), ""),
    "no report": (message("F", **{messages.REPORT: "fine"}), ""),
    "no steps": (message("F", **{messages.REPORT: {}}), ""),
    "zero steps": (message("F", **{messages.REPORT: {"steps": 0}}), ""),
    "half a step": (message("F", **{messages.REPORT: {"steps": 0.5}}), ""),
    "a control": (message("F", lambda data: data.update({f"control/{A}": data[A]})), f"{A}"),
    "an offset": (
        message("F", lambda data: data.update({A.replace("lora", "offset"): data[A]})),
        A.replace("lora", "offset"),
    ),
    "coded and never decoded": (
        message("F", lambda data: data.update({messages.CODED: b""})),
        messages.CODED,
    ),
    "a fault while decoding": (faulty(), ""),
    "huge": (message("F", lambda data: data[A].fill_(1e30)), ""),
    "no DXO": (Shareable({"weights": 1}), ""),
    "metrics": (DXO(DataKind.METRICS, data={"a": 1}).to_shareable(), ""),
}


@pytest.mark.parametrize("first", [True, False], ids=["hostile first", "hostile last"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_update_is_refused_and_changes_nothing(
    kind: str, first: bool, tmp_path: Path
) -> None:
    hostile, key = HOSTILE[kind]
    honest = Server(tmp_path / "honest")
    assert all(honest.accept(site, message(site)) for site in "ABCDE")
    expected = honest.aggregate()

    attacked = Server(tmp_path / "attacked")
    if first:
        assert not attacked.accept("F", hostile)
    assert all(attacked.accept(site, message(site)) for site in "ABCDE")
    if not first:
        assert not attacked.accept("F", hostile)
    found = attacked.aggregate()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    refusal = attacked.job.refused[0]
    assert (refusal.site, refusal.round) == ("F", 1)
    assert refusal.key == key
    assert refusal.reason


def test_the_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    results = []
    for order in (SITES, SITES[::-1], "CADFBE"):
        server = Server(tmp_path / order)
        assert all(server.accept(site, message(site)) for site in order)
        results.append(server.aggregate())
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_a_second_answer_of_a_site_does_not_count(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    assert server.accept("A", message("A"))
    assert not server.accept("A", message("B"))
    assert "second answer" in server.job.refused[0].reason


def test_below_quorum_the_round_fails_and_names_who_counted(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", quorum=3)
    server.accept("A", message("A"))
    server.accept("F", HOSTILE["NaN"][0])
    with pytest.raises(QuorumError, match=r"1 updates count \(A\), 3 needed.*refused: F"):
        server.aggregate()
    # Nothing but A's own adapter, which it sent for the cross-site matrix of the last round.
    assert [path.name for path in (tmp_path / "run").rglob("*.*")] == ["A.safetensors"]


def test_no_updates_at_all_fail(tmp_path: Path) -> None:
    with pytest.raises(QuorumError, match="none"):
        Server(tmp_path / "run", quorum=1).aggregate()


def test_an_answer_after_the_rounds_end_does_not_count(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    assert all(server.accept(site, message(site)) for site in "ABCDE")
    server.aggregate()
    assert not server.accept("F", message("F"))
    assert "closed" in server.job.refused[-1].reason
    server.aggregator.reset(server.context)
    assert server.accept("F", message("F"))


def test_no_update_is_kept(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", quorum=1)
    data = tensors(ord("A"))
    kept = [weakref.ref(tensor) for tensor in data.values()]
    meta = {messages.WEIGHT: 1.0, messages.REPORT: STEPS}
    assert server.accept("A", messages.weights_dxo(data, SPEC, 1, **meta).to_shareable())
    del data
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_the_last_round_leaves_the_adapters_of_the_sites_that_count(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    # G answered in a try of this round that was broken off, and does not answer now.
    server.job.folder.save("sites/G", tensors(0), SPEC, round=1)
    assert all(server.accept(site, message(site)) for site in "ABCDE")
    assert not server.accept("F", message("F", **{messages.WEIGHT: 1e-300}))
    server.aggregate()
    found = sorted((tmp_path / "run" / "sites").iterdir())
    assert [path.name for path in found] == [f"{site}.safetensors" for site in "ABCDE"]
    saved = server.job.folder.load("sites/B", SPEC)
    assert saved.tensors.keys() == tensors(ord("B")).keys()
    assert all(torch.equal(saved.tensors[name], one) for name, one in tensors(ord("B")).items())
    assert saved.extra == {"round": 1, "federation": server.job.federation.to_dict()}


def test_before_the_last_round_no_sites_adapter_is_written(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", quorum=1)
    server.context.set_prop(AppConstants.CURRENT_ROUND, 0, private=True, sticky=True)
    assert server.accept("A", message("A", **{messages.ROUND: 0}))
    server.aggregate()
    assert not list((tmp_path / "run").iterdir())


def test_what_the_rule_refuses_is_named(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    assert not server.accept("F", message("F", **{messages.WEIGHT: 1e-300}))
    refusal = server.job.refused[0]
    assert (refusal.site, refusal.round, refusal.key) == ("F", 1, "")
    assert "weight 1e-300 of site 'F'" in refusal.reason
    assert server.accept("F", message("F"))  # a refused answer may be mended


def test_a_round_in_which_the_server_itself_failed_gives_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path / "run", quorum=1)
    assert server.accept("A", message("A"))

    def run_out(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(server.aggregator._round._rule._products, "add", run_out)
        with pytest.raises(MemoryError):
            server.accept("B", message("B"))
    with pytest.raises(RuntimeError, match="update of site B"):
        server.aggregate()
    server.aggregator.reset(server.context)
    assert server.accept("B", message("B"))
    server.aggregate()


def test_refusals_are_listed_by_site(tmp_path: Path) -> None:
    lines = []
    for name, sites in (("first", "CB"), ("second", "BC")):
        server = Server(tmp_path / name, quorum=1)
        server.accept("A", message("A"))
        for site in sites:
            server.accept(site, message(site, **{messages.ROUND: 0}))
        server.aggregate()
        lines.append([one["site"] for one in server.job.round_line(1)["refused"]])
    assert lines == [["B", "C"], ["B", "C"]]


def test_the_best_adapter_is_chosen_on_sites_that_scored_both(tmp_path: Path) -> None:
    job = Server(tmp_path / "run").job
    assert keep_best(job, ServerState(tensors(1)), 1, {"A": 0.8, "B": 0.3})
    # Without the hard site B the mean is higher, the adapter is not better.
    assert not keep_best(job, ServerState(tensors(2)), 2, {"A": 0.8})
    assert not keep_best(job, ServerState(tensors(2)), 2, {})
    assert keep_best(job, ServerState(tensors(3)), 3, {"A": 0.7, "B": 0.5})


def test_the_best_adapters_file_does_not_depend_on_who_answered_first(tmp_path: Path) -> None:
    files = []
    for name, sites in (("first", "AB"), ("second", "BA")):
        job = Server(tmp_path / name).job
        job.reports = {site: {"dice": {"mean": {"A": 0.8, "B": 0.3}[site]}} for site in sites}
        assert keep_best(job, ServerState(tensors(1)), 1, job.validation_scores())
        files.append(job.folder.adapter_path(BEST).read_bytes())
    assert files[0] == files[1]


def test_the_quorum_follows_from_the_settings_and_the_sites_there_are() -> None:
    assert quorum_of(Federation(), 6) == 6
    assert quorum_of(Federation(min_sites=4), 6) == 4
    assert quorum_of(Federation(sites_per_round=3), 6) == 3
    assert quorum_of(Federation(sites_per_round=3, min_sites=2), 6) == 2
    for name in ("min_sites", "sites_per_round"):
        with pytest.raises(SettingsError, match=f"{name}: 7 is more than the 6 sites"):
            quorum_of(Federation(**{name: 7}), 6)
