"""A site's limits where they hold: the executor before it builds, the gate on every message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import SiteContext
from nvflare.apis.dxo import DataKind
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from scan_files import write_sites
from test_executor import FEDERATION, first_adapter, train_task
from wire import CODED, Wire

from flap_nvflare.flare import messages
from flap_nvflare.flare.coding import PrivacyFilter
from flap_nvflare.flare.context import read_limits, read_site
from flap_nvflare.flare.executor import FlapExecutor
from flap_nvflare.flare.site_gate import SiteGate
from flap_nvflare.settings import SettingsError
from flap_nvflare.site.limits import Limits
from flap_nvflare.site.reasons import SiteError
from flap_nvflare.site.show import FIGURES

BIG = "image_encoder.blocks.0.attn.qkv.weight"


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteContext:
    monkeypatch.setenv("FLAP_HOME", str(tmp_path / "home"))
    for name in ("FLAP_DATA_ROOT", "FLAP_SAM_CHECKPOINT", "FLAP_DATA_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    write_sites(tmp_path / "scans", ("A",))
    return site(tmp_path)


def site(folder: Path, limits: str = "", simulated: bool = False) -> SiteContext:
    context = SiteContext(folder, simulated=simulated)
    text = f"data_root: {folder / 'scans'}\n{limits}"
    (context.local / "flap_site.yaml").write_text(text, encoding="utf-8")
    return context


@pytest.mark.parametrize(
    ("limits", "settings", "reason"),
    [
        ("", {"method": "full"}, "method_refused"),
        ("limits: {methods: [lora]}", {}, "method_refused"),
        ("limits: {ranges: {batch_size: [4, 8]}}", {}, "setting_refused"),
        ("", {"rounds": 1001}, "setting_refused"),
        ("limits: {choices: {encryption: [he]}}", {}, "setting_refused"),
        ("limits: {dp_clip: 1, dp_noise: 1}", {"dp_clip": 1.0}, "setting_refused"),
    ],
)
def test_a_job_outside_the_limits_is_refused_before_anything_is_built(
    tmp_path: Path,
    context: SiteContext,
    limits: str,
    settings: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = site(tmp_path, limits)
    monkeypatch.setattr("flap_nvflare.bundle.workflow.build_work", None)  # would raise
    with pytest.raises(SiteError) as caught:
        FlapExecutor()._open(train_task(**settings), context)
    assert caught.value.reason == reason
    assert not (tmp_path / "home").exists()


def test_too_few_cases_are_known_before_training(tmp_path: Path, context: SiteContext) -> None:
    FlapExecutor()._open(train_task(), site(tmp_path, "limits: {min_cases: 2}"))
    executor = FlapExecutor()
    with pytest.raises(SiteError) as caught:  # one of three cases is held out
        executor._open(train_task(), site(tmp_path, "limits: {min_cases: 3}"))
    assert caught.value.to_dict()["numbers"] == {"cases": 2, "min_cases": 3}
    reply = executor.execute(
        messages.TRAIN, train_task(), site(tmp_path, "limits: {min_cases: 3}"), Signal()
    )
    assert reply.get_return_code() != ReturnCode.OK
    assert "DXO" not in reply


def test_an_update_too_large_is_not_trained(tmp_path: Path, context: SiteContext) -> None:
    size = first_adapter()[1].bytes / 1e6
    exact = site(tmp_path, f"limits: {{max_update_mb: {size}}}")
    FlapExecutor()._open(train_task(), exact)
    with pytest.raises(SiteError) as caught:  # a control variate of each number goes with it
        FlapExecutor()._open(train_task(optimizer="scaffold"), exact)
    assert caught.value.reason == "update_too_large"


def test_limits_hold_at_a_real_site_without_a_file_and_in_no_simulation(tmp_path: Path) -> None:
    assert read_limits(SiteContext(tmp_path)) == Limits()
    assert read_limits(SiteContext(tmp_path, simulated=True)) is None
    assert read_limits(site(tmp_path, "limits: {min_cases: 9}", simulated=True)) == Limits(
        min_cases=9
    )


def test_a_rehearsal_needs_a_word_in_the_file(tmp_path: Path, context: SiteContext) -> None:
    file = context.local / "flap_site.yaml"
    for text in ("", "allow_synthetic: false\n"):
        file.write_text(text)
        with pytest.raises(SettingsError, match="has no data"):
            read_site(context)
    file.write_text("allow_synthetic: true\n")
    assert read_site(context).synthetic
    file.write_text(f"allow_synthetic: true\ndata_root: {tmp_path}\n")
    assert not read_site(context).synthetic
    (tmp_path / "PHANTOM.json").touch()  # phantoms that the file names as its data are phantoms
    assert read_site(context).synthetic


def test_only_the_sites_own_list_of_scans_is_used(
    tmp_path: Path, context: SiteContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "job" / "custom" / "site_data.py"
    monkeypatch.setenv("FLAP_DATA_SOURCE", str(elsewhere))
    assert read_site(context).data_source is None
    assert read_site(site(tmp_path, simulated=True)).data_source == elsewhere
    own = context.local / "custom" / "site_data.py"
    own.parent.mkdir()
    own.touch()
    for simulated in (False, True):
        assert read_site(site(tmp_path, simulated=simulated)).data_source == own


def reply_with(*names: str) -> Shareable:
    tensors, spec = first_adapter()
    for name in names:
        tensors[name] = torch.zeros(2)
    return messages.weights_dxo(tensors, spec, 0).to_shareable()


def test_the_gate_asks_the_site_and_not_the_job(tmp_path: Path, context: SiteContext) -> None:
    # The context has no job's federation.yaml at all.
    gate = SiteGate()
    assert gate.process(reply_with(), context) is not None
    with pytest.raises(ContentBlockedException, match="this site's methods"):
        gate.process(reply_with(BIG), context)
    with pytest.raises(ContentBlockedException, match="patient"):
        gate.process(reply_with("patient"), context)
    with pytest.raises(ContentBlockedException):
        gate.process(reply_with(), site(tmp_path, "limits: {methods: [lora, decoder]}"))


def test_a_bad_file_lets_nothing_pass(tmp_path: Path, context: SiteContext) -> None:
    with pytest.raises(SettingsError):
        SiteGate().process(reply_with(), site(tmp_path, "limits: {methods: [flop]}"))


def test_an_error_reply_passes_bare(context: SiteContext) -> None:
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply["scan"] = torch.zeros(2)
    assert "scan" not in SiteGate().process(reply, context)


def test_what_a_reply_says_is_what_the_site_is_told(context: SiteContext) -> None:
    reply = FlapExecutor().execute(messages.TRAIN, train_task(), context, Signal())
    assert SiteGate().process(reply, context) is reply
    report = messages.read_dxo(reply, DataKind.WEIGHTS).meta[messages.REPORT]
    assert set(report) == set(FIGURES) - {"privacy"}
    assert reply.get_header(messages.FEDERATION) == FEDERATION.to_dict()


def test_noise_is_added_once_though_site_and_job_both_ask(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **{**CODED, "dp_clip": 1.0, "dp_noise": 1.0})
    update = {name: tensor + 0.1 for name, tensor in wire.job.state.tensors.items()}
    context = wire.site_contexts["A"]
    reply = wire.reply("A", wire.received("A"), update)
    private = PrivacyFilter().process(reply, context)  # the site's own policy comes first
    assert private is not reply
    assert SiteGate().process(private, context) is private
    assert PrivacyFilter().process(private, context) is private
    assert wire.accept("A", wire.sent_up("A", private))
    counts = (tmp_path / "A" / "releases_A.json").read_text()
    assert json.loads(counts) == {"1.0": 1}


def test_coded_messages_pass_the_gate_by_the_names_in_them(tmp_path: Path) -> None:
    wire = Wire(tmp_path, **CODED)
    context = wire.site_contexts["A"]
    for _ in range(2):
        task = wire.sent_down("A")
        assert SiteGate(offset=True).process(task, context) is task
        for name in ("A", "B"):
            received = wire.received(name)
            update = {key: t + 0.1 for key, t in wire.job.state.tensors.items()}
            message = wire.answer(name, update, received)
            assert SiteGate().process(message, wire.site_contexts[name]) is message
        wire.next_round()
    (context.local / "flap_site.yaml").write_text("limits: {methods: [lora]}\n")
    with pytest.raises(ContentBlockedException):
        SiteGate().process(message, context)
