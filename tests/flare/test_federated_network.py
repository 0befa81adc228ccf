"""A federation of another network than SAM: who decides what it is, and what of it leaves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import SiteContext
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from own_networks import NAMED, SETTINGS, write_unet
from safetensors.torch import load_file
from scan_files import write_sites
from test_reply_check import finished
from wire import Wire, weights

from flap_nvflare.adapter.update import load_update
from flap_nvflare.bundle.own_network import build_own_network
from flap_nvflare.flare import messages
from flap_nvflare.flare.asked import Asked, TaskReader, shapes_up
from flap_nvflare.flare.context import read_limits
from flap_nvflare.flare.executor import FlapExecutor
from flap_nvflare.flare.recipe import FlapRecipe
from flap_nvflare.flare.reply_check import check_reply
from flap_nvflare.flare.site_gate import SiteGate
from flap_nvflare.sam.tuning import Parts
from flap_nvflare.settings import BUNDLE_VARIABLE, Federation, SettingsError
from flap_nvflare.site.reasons import SiteError

OWN = Federation.from_dict(SETTINGS)
PLAIN = dataclasses.asdict(OWN)
FROZEN = "model.0.conv.weight"
LIMITS = 'limits: {methods: [flap, named], parameters: ["model.2.*"]}\n'


@pytest.fixture
def wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wire:
    """A server whose environment names the network, and site A, whose own file does."""
    file = write_unet(tmp_path)
    monkeypatch.setenv(BUNDLE_VARIABLE, str(file))
    monkeypatch.setenv("FLAP_HOME", str(tmp_path / "home"))
    made = Wire(tmp_path, **PLAIN)
    monkeypatch.delenv(BUNDLE_VARIABLE)
    write_sites(tmp_path / "scans", ("A",))
    policy(made.site_contexts["A"], tmp_path, f"bundle: {file}\n{LIMITS}")
    return made


def policy(context: SiteContext, folder: Path, text: str) -> None:
    lines = f"data_root: {folder / 'scans'}\nstate_dir: {folder}\nown_process: off\n{text}"
    (context.local / "flap_site.yaml").write_text(lines, encoding="utf-8")


def trained(wire: Wire) -> Shareable:
    task = wire.received("A")
    return FlapExecutor().execute(messages.TRAIN, task, wire.site_contexts["A"], Signal())


def asked(wire: Wire) -> Asked:
    """What the site's last gate compares its reply with."""
    task, context = wire.received("A"), wire.site_contexts["A"]
    task.set_header("__cookie_jar__", {"__task_id__": "t1"})
    context.set_prop(FLContextKey.TASK_NAME, messages.TRAIN, private=True)
    context.set_prop(FLContextKey.TASK_ID, "t1", private=True)
    return TaskReader().read(task, context)


def test_a_real_site_trains_and_sends_what_is_named(wire: Wire, tmp_path: Path) -> None:
    context = wire.site_contexts["A"]
    reply = trained(wire)
    assert reply.get_return_code() == ReturnCode.OK
    message = wire.sent_up("A", SiteGate().process(reply, context))
    names = set(weights(message))
    assert names == set(wire.job.spec.shapes)
    assert all(name.startswith("model.2.") for name in names)
    check_reply(finished(message, messages.TRAIN), asked(wire), 64.0)
    assert wire.accept("A", message), wire.job.refused


def test_no_other_tensor_passes_any_of_the_gates(wire: Wire) -> None:
    context, task = wire.site_contexts["A"], wire.received("A")
    assert FROZEN in wire.job.frozen
    for name in (FROZEN, "model.2.patient", "patient"):
        update = {**wire.job.state.tensors, name: torch.zeros(2)}
        reply = wire.reply("A", task, update)
        if not name.startswith("model.2."):
            with pytest.raises(ContentBlockedException, match="may not travel"):
                wire.sent_up("A", reply)
            with pytest.raises(ContentBlockedException, match="this site's methods"):
                SiteGate().process(reply, context)
        with pytest.raises(ContentBlockedException, match=r"may not travel|none of the network's"):
            check_reply(finished(reply, messages.TRAIN), asked(wire), 64.0)
        assert not wire.accept("A", wire.reply("A", task, update))
    assert "frozen key" in wire.job.refused[0].reason


def test_another_base_is_refused_at_the_site(wire: Wire, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    file = write_unet(other, "channels: [4, 8, 16]", "channels: [4, 8, 16]\n  act: PRELU")
    policy(wire.site_contexts["A"], tmp_path, f"bundle: {file}\n{LIMITS}")
    assert trained(wire).get_return_code() == ReturnCode.OK  # the same by another file
    file = write_unet(other, "channels: [4, 8, 16]", "channels: [4, 8, 32]")
    policy(wire.site_contexts["A"], tmp_path, f"bundle: {file}\n{LIMITS}")
    reply = trained(wire)
    assert reply.get_return_code() == ReturnCode.BAD_TASK_DATA
    assert "DXO" not in reply


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "method_refused"),  # a site that says nothing takes no part
        ('limits: {methods: [flap], parameters: ["*"]}', "method_refused"),
        ('limits: {methods: [named], parameters: ["model.2.0.*", "model.2"]}', "method_refused"),
        (LIMITS, "weights_missing"),  # it names no network, whatever the environment says
    ],
)
def test_a_site_that_has_not_allowed_it_is_left_alone(
    wire: Wire, tmp_path: Path, text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUNDLE_VARIABLE, str(tmp_path / "unet.yaml"))
    policy(wire.site_contexts["A"], tmp_path, text)
    reply = trained(wire)
    assert reply.get_header(messages.REASON)["code"] == reason


@pytest.mark.parametrize(("limits", "built"), [(LIMITS, True), ("", False)])
def test_a_job_that_is_refused_runs_none_of_the_sites_code(
    wire: Wire, tmp_path: Path, limits: str, built: bool
) -> None:
    file, canary = tmp_path / "canary.yaml", tmp_path / "canary"
    file.write_text(f"network_def: \"$__import__('pathlib').Path('{canary}').touch()\"\n")
    policy(wire.site_contexts["A"], tmp_path, f"bundle: {file}\n{limits}")
    asked(wire)  # by the last gate
    trained(wire)  # by the executor
    assert canary.exists() is built


def test_a_site_allows_a_job_no_more_than_its_own_names(wire: Wire) -> None:
    limits = read_limits(wire.site_contexts["A"])
    assert limits is not None
    for names in (("model.2.0.*",), ("model.2.*.bias", "model.2.1.conv.weight"), NAMED):
        limits.check(dataclasses.replace(OWN, parameters=names))
    for names in (("*",), ("model.*",), ("model.2*",), (*NAMED, "model.0.*"), ("*model.2.*",)):
        with pytest.raises(SiteError, match=r"limits\.parameters has"):
            limits.check(dataclasses.replace(OWN, parameters=names))


@pytest.mark.parametrize("text", ["methods: [named]", "parameters: [$a]", "parameters: [a, 1]"])
def test_a_site_file_names_parameters_as_a_job_does(wire: Wire, text: str) -> None:
    context = wire.site_contexts["A"]
    (context.local / "flap_site.yaml").write_text(f"limits: {{{text}}}\n")
    with pytest.raises(SettingsError, match=r"limits\.parameters"):
        read_limits(context)


@pytest.mark.parametrize(
    "change",
    [
        {"bundle": "/tmp/hostile.yaml"},
        {"network_def": {"_target_": "os.system"}},
        {"arch": "/tmp/hostile.yaml"},
        {"arch": "monai.networks.nets.UNet"},
        {"arch": "vit_t"},
        {"method": "flap"},
        {"parameters": []},
        {"parameters": "model.2.*"},
        {"parameters": ["$__import__('os').system('touch canary')"]},
        {"parameters": ["@federation"]},
        {"parameters": ["%hostile.yaml::network_def"]},
        {"parameters": ["model.2.[a-z]*"]},
        {"parameters": ["model.2.?"]},
        {"parameters": [7]},
        {"parameters": ["a" * 201]},
        {"parameters": ["a"] * 65},
    ],
)
def test_a_job_names_no_file_no_class_and_no_expression(change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Federation.from_dict({**SETTINGS, **change})


def test_names_need_the_network_that_they_are_of() -> None:
    with pytest.raises(SettingsError, match="parameters with arch vit_t"):
        Federation(parameters=NAMED)
    assert Federation.from_dict(OWN.to_dict()) == OWN


def test_run_json_counts_all_of_the_network(wire: Wire, tmp_path: Path) -> None:
    network = build_own_network(OWN, tmp_path / "unet.yaml", Parts("named", parameters=NAMED))
    assert wire.job.full_parameters == sum(p.numel() for p in network.parameters())
    assert wire.job.full_parameters > wire.job.spec.parameters


def test_the_recipe_hands_the_names_to_its_filters(tmp_path: Path) -> None:
    FlapRecipe(**SETTINGS).export(job_dir=str(tmp_path))
    (client,) = tmp_path.rglob("config_fed_client.json")
    config = json.loads(client.read_text(encoding="utf-8"))
    found = [
        one["args"]["parameters"]
        for way in ("task_data_filters", "task_result_filters")
        for chain in config[way]
        for one in chain["filters"]
        if one["path"].endswith("AdapterOnlyFilter")
    ]
    assert found
    assert all(names == list(NAMED) for names in found)


@pytest.mark.long
def test_two_sites_train_it_in_a_simulation(simulation: Callable, tmp_path: Path) -> None:
    write_sites(tmp_path / "scans", ("A", "B"))
    file = write_unet(tmp_path)
    own = simulation("own", changes=SETTINGS)
    run = own.run(FLAP_BUNDLE_NETWORK=str(file), FLAP_DATA_ROOT=str(tmp_path / "scans"))
    lines = own.lines(run)
    assert [(line["round"], sorted(line["sites"]), line["refused"]) for line in lines] == [
        (index, ["A", "B"], []) for index in range(2)
    ]
    shapes = shapes_up(OWN, 8, file)
    _, spec, _ = load_update(run / "adapter_last.safetensors")
    assert dict(spec.shapes) == shapes
    assert set(load_file(run / "adapter_last.safetensors")) == set(shapes)
    for line in lines:
        for figures in line["sites"].values():  # the tensors, their spec and the task's settings
            assert spec.bytes < figures["bytes_up"] < spec.bytes + 16_000
    matrix = json.loads((run / "cross_site.json").read_text())
    assert set(matrix) == {"last", "best", "site_A", "site_B"}
