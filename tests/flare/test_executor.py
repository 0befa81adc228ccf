"""The executor at one site, called as FLARE calls it, on a few small scans."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import SiteContext
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.utils import fobs
from scan_files import write_sites

from flap_nvflare.adapter.update import UpdateSpec, content_sha256
from flap_nvflare.flare import messages
from flap_nvflare.flare.context import read_site
from flap_nvflare.flare.executor import FlapExecutor
from flap_nvflare.flare.filters import AdapterOnlyFilter
from flap_nvflare.flare.reports import TIMINGS
from flap_nvflare.sam.segmenter import build_segmenter
from flap_nvflare.sam.tuning import trainable
from flap_nvflare.settings import Federation

FEDERATION = Federation(base="random", image_size=32, rank=2, rounds=2, batch_size=2, augment=False)


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteContext:
    monkeypatch.setenv("FLAP_HOME", str(tmp_path / "home"))
    for name in ("FLAP_DATA_ROOT", "FLAP_SAM_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    context = SiteContext(tmp_path)
    write_sites(tmp_path / "scans", ("A",))
    (context.local / "flap_site.yaml").write_text(
        f"data_root: {tmp_path / 'scans'}\nown_process: off\n", encoding="utf-8"
    )
    return context


def first_adapter() -> tuple[dict[str, torch.Tensor], UpdateSpec]:
    network = build_segmenter("vit_t", 32, 2, "flap", 2, seed=0, base="random")
    tensors = {name: p.detach().clone() for name, p in trainable(network, "flap").items()}
    return tensors, UpdateSpec.of(tensors, "flap", 2, network.base_sha256)


def addressed(dxo: DXO, **settings: Any) -> Shareable:
    task = dxo.to_shareable()
    task.set_header(messages.FEDERATION, {**FEDERATION.to_dict(), **settings})
    task.set_header(messages.RUN, "fed_kits/20260101-000000")
    task.set_header(messages.TURNED, False)
    task.set_header(messages.FIXED, content_sha256({}))
    return task


def train_task(round_index: int = 0, **settings: Any) -> Shareable:
    tensors, spec = first_adapter()
    return addressed(messages.weights_dxo(tensors, spec, round_index), **settings)


def test_trains_validates_and_submits_its_model(context: SiteContext) -> None:
    executor = FlapExecutor()
    reply = executor.execute(messages.TRAIN, train_task(), context, Signal())
    assert reply.get_return_code() == ReturnCode.OK
    trained = messages.read_dxo(reply, DataKind.WEIGHTS)
    start, spec = first_adapter()
    assert UpdateSpec.from_dict(trained.meta[messages.SPEC]) == spec
    assert trained.meta[messages.WEIGHT] == 2.0  # its training cases; one is held out
    assert any(not torch.equal(trained.data[name], start[name]) for name in start)

    submitted = executor.execute(messages.SUBMIT_MODEL, train_task(), context, Signal())
    found = messages.read_dxo(submitted, DataKind.WEIGHTS).data
    assert all(torch.equal(found[name], trained.data[name]) for name in start)

    models = DXO(DataKind.COLLECTION, {"last": messages.weights_dxo(found, spec, 2)})
    scored = executor.execute(messages.VALIDATE, addressed(models), context, Signal())
    scores = messages.read_dxo(scored, DataKind.METRICS).data["last"]
    assert set(scores) == {"test", "validation"}
    assert set(scores["test"]["dice"]) == {"kidney", "tumour", "mean"}
    assert [case["case"] for case in scores["test"]["cases"]] == ["1"]


def test_no_model_is_submitted_where_privacy_is_asked_for(
    context: SiteContext, caplog: pytest.LogCaptureFixture
) -> None:
    executor = FlapExecutor()
    private = {"dp_clip": 1.0, "dp_noise": 1.0}
    reply = executor.execute(messages.TRAIN, train_task(**private), context, Signal())
    assert reply.get_return_code() == ReturnCode.OK
    submitted = executor.execute(messages.SUBMIT_MODEL, train_task(**private), context, Signal())
    assert submitted.get_return_code() == ReturnCode.BAD_TASK_DATA
    assert "DXO" not in submitted
    assert "would leave without noise" in caplog.text


def test_a_reply_has_what_its_filters_need_of_its_task(context: SiteContext) -> None:
    reply = FlapExecutor().execute(messages.TRAIN, train_task(), context, Signal())
    task = messages.handed_on(reply)
    assert task == (FEDERATION, "fed_kits/20260101-000000", False, 0)
    report = messages.read_dxo(reply, DataKind.WEIGHTS).meta[messages.REPORT]
    assert report["steps"] == 2 * 4  # two passes over ten slices of two cases, two at a time
    assert set(report["timings"]) <= set(TIMINGS)


def test_factors_drawn_otherwise_than_at_the_server_stop_the_round(
    context: SiteContext, caplog: pytest.LogCaptureFixture
) -> None:
    task = train_task(rule="ffa")  # A is drawn here, and at this server in another way
    task.set_header(messages.FIXED, "0" * 64)
    reply = FlapExecutor().execute(messages.TRAIN, task, context, Signal())
    assert reply.get_return_code() == ReturnCode.BAD_TASK_DATA
    assert "frozen factors drawn here" in caplog.text


def test_a_part_that_the_rule_does_not_send_is_refused(
    context: SiteContext, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, spec = first_adapter()
    stem = next(name for name in tensors if name.endswith(".lora_a")).removesuffix(".lora_a")
    extra = {f"{stem}.offset_a": torch.zeros(1, 3), f"{stem}.offset_b": torch.zeros(3, 1)}
    control = {f"control/{stem}.lora_a": tensors[f"{stem}.lora_a"]}
    for parts, said in ((extra, "does not change the frozen base"), (control, "not scaffold")):
        task = addressed(messages.weights_dxo({**tensors, **parts}, spec, 0))
        reply = FlapExecutor().execute(messages.TRAIN, task, context, Signal())
        assert reply.get_return_code() != ReturnCode.OK
        assert said in caplog.text


def test_a_limit_that_is_set_while_a_job_runs_is_in_force_at_the_next_task(
    context: SiteContext,
) -> None:
    executor = FlapExecutor()
    reply = executor.execute(messages.TRAIN, train_task(), context, Signal())
    assert reply.get_return_code() == ReturnCode.OK
    path = context.local / "flap_site.yaml"
    path.write_text(path.read_text() + "limits: {min_cases: 3}\n", encoding="utf-8")
    reply = executor.execute(messages.TRAIN, train_task(), context, Signal())
    assert messages.reason_of(reply) == "has 2 training cases, its own file asks for 3"


def test_an_unknown_task_is_said_to_be_unknown(context: SiteContext) -> None:
    reply = FlapExecutor().execute("dance", train_task(), context, Signal())
    assert reply.get_return_code() == ReturnCode.TASK_UNKNOWN


def test_an_abort_ends_the_round_before_the_next_step(
    context: SiteContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal, steps = Signal(), []

    def tell(self: FlapExecutor, workflow: Any, fl_ctx: FLContext) -> Any:
        def told(figures: dict[str, Any]) -> None:
            steps.append(figures["step"])
            signal.trigger(True)

        return told

    monkeypatch.setattr(FlapExecutor, "_progress", tell)
    executor = FlapExecutor()
    reply = executor.execute(messages.TRAIN, train_task(local_epochs=5), context, signal)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED
    assert "DXO" not in reply
    assert steps == [1]

    # The next round starts from files and messages alone, as if nothing had been interrupted.
    monkeypatch.undo()
    again = executor.execute(messages.TRAIN, train_task(local_epochs=5), context, Signal())
    fresh = FlapExecutor().execute(messages.TRAIN, train_task(local_epochs=5), context, Signal())
    one, other = (messages.read_dxo(reply, DataKind.WEIGHTS).data for reply in (again, fresh))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fault", ["frozen key", "wrong shape", "other base", "NaN"])
def test_a_false_adapter_of_the_server_is_refused(
    context: SiteContext, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, spec = first_adapter()
    name = "mask_decoder.mask_tokens.weight"
    if fault == "frozen key":
        name = "image_encoder.blocks.0.attn.qkv.weight"
        tensors[name] = torch.zeros(2)
    elif fault == "wrong shape":
        tensors[name] = torch.zeros(2, 2)
    elif fault == "NaN":
        tensors[name][0, 0] = float("nan")
    else:
        spec, name = UpdateSpec.of(tensors, "flap", 2, "0" * 64), "base"
    task = addressed(messages.weights_dxo(tensors, spec, 0))
    reply = FlapExecutor().execute(messages.TRAIN, task, context, Signal())
    assert reply.get_return_code() == ReturnCode.BAD_TASK_DATA
    assert reply.get_header(messages.REASON) == {"code": "message_refused", "numbers": {}}
    assert name in caplog.text


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rank": -1}, "rank"),
        ({"method": "all"}, "method"),
        ({"code": "$__import__('os')"}, "code"),
    ],
)
def test_settings_that_are_not_allowed_do_not_run(
    context: SiteContext, settings: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply = FlapExecutor().execute(messages.TRAIN, train_task(**settings), context, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert reply.get_header(messages.REASON) == {"code": "setting_refused", "numbers": {}}
    assert f"setting '{problem}'" in caplog.text or f"setting {problem}" in caplog.text


def test_a_real_site_without_data_stops_and_makes_none(
    context: SiteContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (context.local / "flap_site.yaml").unlink()
    reply = FlapExecutor().execute(messages.TRAIN, train_task(), context, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert reply.get_header(messages.REASON) == {"code": "data_missing", "numbers": {}}
    assert "site A has no data" in caplog.text
    assert not (tmp_path / "home" / "demo_kits").exists()


def test_a_pinned_base_is_the_only_one(
    context: SiteContext, caplog: pytest.LogCaptureFixture
) -> None:
    with (context.local / "flap_site.yaml").open("a") as file:
        file.write(f"checkpoint_sha256: '{'1' * 64}'\n")
    reply = FlapExecutor().execute(messages.TRAIN, train_task(), context, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert reply.get_header(messages.REASON) == {"code": "weights_other", "numbers": {}}
    assert "1" * 64 in caplog.text


def test_a_reason_leaves_the_site_through_its_filters_without_any_text(
    context: SiteContext, tmp_path: Path
) -> None:
    with (context.local / "flap_site.yaml").open("a") as file:
        file.write(f"checkpoint: {tmp_path / 'secret' / 'vit_t.safetensors'}\n")
    task = train_task(base="pretrained")
    reply = FlapExecutor().execute(messages.TRAIN, task, context, Signal())
    passed = AdapterOnlyFilter("flap").process(reply, context)
    received = fobs.loads(fobs.dumps(passed))
    assert received.get_header(messages.REASON) == {"code": "weights_missing", "numbers": {}}
    assert b"secret" not in fobs.dumps(passed)
    assert messages.reason_of(received) == "lacks the file of the base model's weights"
    assert messages.reason_of(make_reply("TASK_\x1bABORTED")) == "failed (TASK_?ABORTED)"


def test_a_bad_number_in_the_sites_file_is_named(
    context: SiteContext, caplog: pytest.LogCaptureFixture
) -> None:
    with (context.local / "flap_site.yaml").open("a") as file:
        file.write("workers: many\n")
    reply = FlapExecutor().execute(messages.TRAIN, train_task(), context, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "workers is 'many'" in caplog.text


def test_a_site_keeps_its_prepared_scans_as_its_file_says(context: SiteContext) -> None:
    with (context.local / "flap_site.yaml").open("a") as file:
        file.write("cache_gb: 1\nworkers: 2\n")
    site = read_site(context)
    assert (site.cache_gb, site.workers) == (1.0, 2)


def test_no_name_of_a_case_is_logged_as_an_error(
    context: SiteContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # FLARE sends what is logged at this level to the server.
    mask = tmp_path / "scans" / "case_00000" / "segmentation.nii.gz"
    mask.write_bytes(np.zeros(8).tobytes())
    reply = FlapExecutor().execute(messages.TRAIN, train_task(), context, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "case_00000" in caplog.text
    assert reply.get_header(messages.REASON) == {"code": "data_missing", "numbers": {}}
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors
    assert not any("case_" in text for text in errors)
