"""The filters that seal and open, the keys of either side, and the guard's half at the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encryption_cases import SPEC, update
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.fuel.utils import fobs

from flap_nvflare.adapter.cipher import SEALED, CipherError, make_keys
from flap_nvflare.aggregation.server import ServerState
from flap_nvflare.combinations import check
from flap_nvflare.flare import encryption, messages
from flap_nvflare.flare.aggregator import FlapAggregator
from flap_nvflare.flare.encryption import (
    SERVER_CONTEXT,
    SITE_CONTEXT,
    DecryptAdapter,
    EncryptUpdate,
    server_cipher,
)
from flap_nvflare.flare.job import _JOB, ServerJob
from flap_nvflare.flare.run import LAST, RunFolder
from flap_nvflare.sam.tuning import Parts
from flap_nvflare.settings import Federation, SettingsError

HE = {"encryption": "he", "rule": "mean", "cross_site": "global", "rounds": 2}
JOB = Path(__file__).parents[2] / "jobs" / "fed_kits" / "app" / "config"


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FLContext:
    monkeypatch.setenv("FLAP_HOME", str(tmp_path))
    fl_ctx = FLContext()
    fl_ctx.set_prop(FLContextKey.SIMULATE_MODE, True, private=True, sticky=True)
    return fl_ctx


def message(seed: int, weight: float, **meta: object) -> Shareable:
    values = {messages.WEIGHT: weight, messages.REPORT: {"steps": 1}, **meta}
    return messages.weights_dxo(update(seed), SPEC, 0, **values).to_shareable()


def wire(shareable: Shareable) -> Shareable:
    return fobs.loads(fobs.dumps(shareable))


class Server:
    """An aggregator with an encrypted job in round 0."""

    def __init__(self, folder: Path, context: FLContext) -> None:
        folder.mkdir()
        federation = Federation(**HE)
        cipher = server_cipher(context, federation)
        self.job = ServerJob(
            federation,
            RunFolder(folder),
            SPEC,
            {"x.weight"},
            fixed={},
            parts=Parts("flap"),
            state=ServerState(update(0)),
            sites=("A", "B", "F"),
            cipher=cipher,
        )
        self.job.begin_round(0)
        self.aggregator = FlapAggregator()
        self.context = FLContext()
        self.context.set_prop(_JOB, self.job, private=True, sticky=True)
        self.context.set_prop(AppConstants.CURRENT_ROUND, 0, private=True, sticky=True)

    def accept(self, site: str, shareable: Shareable) -> bool:
        self.context.set_prop(messages.SENDER, site, private=True, sticky=False)
        return self.aggregator.accept(shareable, self.context)


def test_a_round_from_filter_to_filter_gives_the_weighted_mean(
    tmp_path: Path, context: FLContext
) -> None:
    server = Server(tmp_path / "run", context)
    server.job.quorum = 2
    for seed, (site, weight) in enumerate({"A": 30.0, "B": 10.0}.items()):
        sent = wire(EncryptUpdate("he").process(message(seed, weight), context))
        dxo = messages.read_dxo(sent, DataKind.WEIGHTS)
        assert set(dxo.data) == SEALED
        assert dxo.meta[messages.WEIGHT] == weight
        assert server.accept(site, sent), server.job.refused
    result = server.aggregator.aggregate(server.context)
    assert json.dumps(server.job.round_line(0))  # no nan where no error is known
    # What the persistor writes and a resumed run reads is sealed, too.
    sealed = messages.read_dxo(result, DataKind.WEIGHTS).data
    server.job.folder.save(LAST, sealed, server.job.stored, rounds=1)
    saved = server.job.folder.load(LAST, server.job.stored)
    assert saved is not None
    task = wire(messages.weights_dxo(saved.tensors, SPEC, 1).to_shareable())
    task.set_header(messages.RUN, "job/time")
    opened = DecryptAdapter().process(task, context)
    assert opened.get_header(messages.RUN) == "job/time"
    dxo = messages.read_dxo(opened, DataKind.WEIGHTS)
    assert dxo.meta[messages.ROUND] == 1
    for name in SPEC.shapes:
        expected = 0.75 * update(0)[name].double() + 0.25 * update(1)[name].double()
        torch.testing.assert_close(dxo.data[name].double(), expected, rtol=3e-7, atol=3e-8)


REFUSED = {
    "a plain update": (lambda c: message(1, 2.0), "expected exactly"),
    "another round": (
        lambda c: EncryptUpdate("he").process(message(1, 2.0, **{messages.ROUND: 3}), c),
        "round 3, expected 0",
    ),
    "a huge weight": (
        lambda c: EncryptUpdate("he").process(message(1, 1e7), c),
        "not in",
    ),
    "another weight than sealed": (
        lambda c: reweighted(EncryptUpdate("he").process(message(1, 2.0), c), 200.0),
        "sealed with weight 2.0, but sent with 200.0",
    ),
}


def reweighted(shareable: Shareable, weight: float) -> Shareable:
    shareable["DXO"]["meta"][messages.WEIGHT] = weight
    return shareable


@pytest.mark.parametrize("kind", REFUSED)
def test_the_server_refuses_what_it_can_check(
    kind: str, tmp_path: Path, context: FLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flap_nvflare.adapter.cipher.MOST_SITES", 1)  # seals a huge weight
    make, reason = REFUSED[kind]
    server = Server(tmp_path / "run", context)
    assert not server.accept("F", make(context))
    assert reason in server.job.refused[0].reason
    assert server.job.refused[0].site == "F"


def test_adapters_of_the_cross_site_evaluation_are_opened_one_by_one(context: FLContext) -> None:
    cipher = EncryptUpdate("he").cipher(context)
    parts = {
        "last": messages.weights_dxo(cipher.seal(update(0), SPEC, 2.0), SPEC, 2),
        "first": messages.weights_dxo(update(1), SPEC, 2),
    }
    task = wire(DXO(DataKind.COLLECTION, data=parts).to_shareable())
    opened = messages.read_dxo(DecryptAdapter().process(task, context), DataKind.COLLECTION).data
    for seed, name in enumerate(("last", "first")):
        for key, tensor in update(seed).items():
            torch.testing.assert_close(opened[name].data[key], tensor, rtol=2e-7, atol=2e-7)


def test_what_is_not_sealed_comes_in_as_it_is(context: FLContext) -> None:
    for plain in (
        message(0, 1.0),
        Shareable(),
        DXO(DataKind.METRICS, data={"a": 1}).to_shareable(),
    ):
        before = dict(plain)
        assert dict(DecryptAdapter().process(plain, context)) == before


def test_a_damaged_sum_is_blocked(context: FLContext) -> None:
    sealed = EncryptUpdate("he").cipher(context).seal(update(0), SPEC, 2.0)
    sealed["sealed.ciphertext"][:, 8:4000] = 7
    task = messages.weights_dxo(sealed, SPEC, 1).to_shareable()
    with pytest.raises(ContentBlockedException, match="can't be opened: piece 0"):
        DecryptAdapter().process(task, context)


def test_scores_errors_and_sealed_messages_pass_the_encrypting_filter(context: FLContext) -> None:
    seal = EncryptUpdate("he")
    metrics = DXO(DataKind.METRICS, data={"a": 1}).to_shareable()
    error = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    sealed = seal.process(message(0, 1.0), context)
    for passing in (metrics, error, sealed):
        before = passing.get("DXO")
        assert seal.process(passing, context).get("DXO") is before


def test_in_doubt_nothing_leaves(context: FLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {
        "WEIGHT_DIFF.*can't be sealed": DXO(DataKind.WEIGHT_DIFF, data=update(0)).to_shareable(),
        "not encrypted, so not sent": DXO(DataKind.WEIGHTS, data=update(0)).to_shareable(),
        "lower the learning rate": message(0, 1e12),
        "so not sent: ": Shareable({"DXO": 3}),
    }
    for text, one in bad.items():
        with pytest.raises(ContentBlockedException, match=text):
            EncryptUpdate("he").process(one, context)
    # A site that got a server's context can't seal, so it sends nothing.
    monkeypatch.setattr(encryption, "_simulated_key", lambda name, fl_ctx: make_keys()[1])
    with pytest.raises(ContentBlockedException, match="no secret key"):
        EncryptUpdate("he").process(message(0, 1.0), context)


def test_without_encryption_the_filter_leaves_all_as_it_is(context: FLContext) -> None:
    plain = message(0, 1.0)
    before = plain["DXO"]
    assert EncryptUpdate("none").process(plain, context)["DXO"] is before


def test_a_server_with_the_secret_key_does_not_start(
    context: FLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server_cipher(context, Federation()) is None
    assert not server_cipher(context, Federation(**HE)).opens  # type: ignore[union-attr]
    monkeypatch.setattr(encryption, "_simulated_key", lambda name, fl_ctx: make_keys()[0])
    with pytest.raises(SettingsError, match="holds the secret key"):
        server_cipher(context, Federation(**HE))


def test_only_the_owner_reads_the_simulators_keys(tmp_path: Path, context: FLContext) -> None:
    server_cipher(context, Federation(**HE))
    folder = tmp_path / "simulated_keys"
    assert folder.stat().st_mode & 0o77 == 0
    assert {path.name for path in folder.iterdir()} >= {SITE_CONTEXT, SERVER_CONTEXT}


def test_a_real_site_without_a_key_names_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        pass

    fl_ctx = FLContext()
    monkeypatch.setattr(fl_ctx, "get_engine", Engine)
    with pytest.raises(CipherError, match=f"{SERVER_CONTEXT}.*HEBuilder"):
        server_cipher(fl_ctx, Federation(**HE))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rule", "svd"),
        ("cross_site", "all"),
        ("optimizer", "fedadam"),
        ("upload", ("fp16",)),
        ("site_ranks", {"A": 2}),
    ],
)
def test_what_only_works_in_the_clear_is_refused(name: str, value: object) -> None:
    check(Federation(**HE))
    check(Federation(**{**HE, name: value, "encryption": "none"}))
    with pytest.raises(SettingsError, match=r"encryption: he"):
        check(Federation(**{**HE, name: value}))


def test_the_jobs_filters_name_every_task() -> None:
    # FLARE finds a filter by the task's own name and knows no patterns: '*' would filter nothing.
    config = json.loads((JOB / "config_fed_client.json").read_text(encoding="utf-8"))
    for chain in ("task_data_filters", "task_result_filters"):
        (only,) = config[chain]
        assert only["tasks"] == config["executors"][0]["tasks"]
    first, last = config["task_data_filters"][0], config["task_result_filters"][0]
    assert first["filters"][0]["path"].endswith("DecryptAdapter")
    assert last["filters"][-1]["path"].endswith("EncryptUpdate")
