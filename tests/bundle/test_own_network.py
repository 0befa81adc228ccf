"""Another network than SAM: what trains, what is the base, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_networks import NAMED, SETTINGS, UNET, write_unet

from flap_nvflare.adapter.update import load_update
from flap_nvflare.bundle.own_network import build_own_network, require_logits
from flap_nvflare.bundle.round_files import RoundFolder
from flap_nvflare.bundle.trained import load_trained
from flap_nvflare.bundle.workflow import CONFIGS, TRAIN_CONFIG, build_work
from flap_nvflare.combinations import check
from flap_nvflare.in_process import federate
from flap_nvflare.sam.checkpoint import CheckpointError, MissingCheckpointError
from flap_nvflare.sam.network import Network
from flap_nvflare.sam.runtime import choose, place
from flap_nvflare.sam.tuning import Parts, travels
from flap_nvflare.settings import BUNDLE_VARIABLE, Federation, OtherBaseError, SettingsError, Site
from flap_nvflare.training.site_round import SiteRound

OWN = Federation.from_dict(SETTINGS)
CPU = torch.device("cpu")


def build(file: Path | None, **changes: Any) -> Network:
    federation = dataclasses.replace(OWN, **changes)
    network = build_own_network(federation, file, Parts("named", parameters=federation.parameters))
    require_logits(network, str(file))
    return network


@pytest.fixture
def own(site: Site, tmp_path: Path) -> Site:
    return dataclasses.replace(site, bundle=write_unet(tmp_path))


def test_only_what_is_named_changes(own: Site) -> None:
    work = build_work(OWN, own)
    before = {name: tensor.clone() for name, tensor in work.network.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before)
    loss = [work.train(index).loss for index in range(2)]
    assert loss[1] < loss[0]
    after = work.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(work.spec().shapes) == set(work.adapter())
    assert changed == {
        name for name, _ in work.network.named_parameters() if name[:8] == "model.2."
    }
    assert work.evaluate("validation").dice is not None


def test_equal_seeds_give_equal_bases_and_leave_torchs_own_draws_alone(tmp_path: Path) -> None:
    file = write_unet(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = build(file)
    assert torch.equal(torch.rand(2), expected)
    again = build(file)
    assert again.base_sha256 == first.base_sha256
    for (name, one), (_, other) in zip(
        first.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert build(file, seed=4).base_sha256 != first.base_sha256
    # What trains comes from the server: it is no part of the base.
    assert build(file, parameters=("model.1.*",)).base_sha256 != first.base_sha256
    wider = write_unet(tmp_path, "channels: [4, 8, 16]", "channels: [4, 8, 32]")
    assert build(wider).base_sha256 != first.base_sha256


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_of_its_own(tmp_path: Path, ending: str) -> None:
    from safetensors.torch import save_file

    state = dict(build(write_unet(tmp_path), seed=9).state_dict())
    path = tmp_path / f"unet.{ending}"
    torch.save(state, path) if ending == "pt" else save_file(state, path)
    loaded = build(write_unet(tmp_path, more=f"weights: {path}\n"), base="pretrained")
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "settings", "error", "match"),
    [
        (("network_def:", "net:"), {}, SettingsError, "no item network_def"),
        (("nets.UNet", "nets.NoNet"), {}, Exception, "NoNet"),
        (("in_channels: 3", "in_channels: 1"), {}, SettingsError, r"takes no image \(1, 3, 32"),
        (("spatial_dims: 2", "spatial_dims: 3"), {}, SettingsError, "2 spatial"),
        (("@federation.classes + 1", "5"), {}, SettingsError, r"gives \(1, 5, 32, 32\).*\(1, 3,"),
        ((UNET, "network_def: $dict()\n"), {}, SettingsError, "dict, no torch module"),
        (
            ("", ""),
            {"parameters": ("model.2.*", "head.*")},
            SettingsError,
            r"'head\.\*' names none",
        ),
        (("", ""), {"base": "pretrained"}, MissingCheckpointError, "set base: random"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: tuple[str, str], settings: dict, error: type, match: str
) -> None:
    with pytest.raises(error, match=match):
        build(write_unet(tmp_path, *change), **settings)


def test_no_file_and_other_weights(tmp_path: Path) -> None:
    for file in (None, tmp_path / "none.yaml"):
        with pytest.raises(MissingCheckpointError, match="FLAP_BUNDLE_NETWORK"):
            build(file)
    path = tmp_path / "other.pt"
    torch.save({"model.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="name the state dict of network_def"):
        build(write_unet(tmp_path, more=f"weights: {path}\n"), base="pretrained")


def test_running_statistics_are_of_the_base_whatever_is_named(tmp_path: Path) -> None:
    file, everything = write_unet(tmp_path), ("*",)
    first = build(file, parameters=everything)
    state = dict(first.state_dict())
    name = next(name for name in state if name.endswith("running_mean"))
    state[name] = state[name] + 1
    torch.save(state, tmp_path / "unet.pt")
    file = write_unet(tmp_path, more=f"weights: {tmp_path / 'unet.pt'}\n")
    other = build(file, parameters=everything, base="pretrained")
    assert other.base_sha256 != first.base_sha256
    assert name not in dict(other.named_parameters())


def test_a_site_pins_its_base(own: Site) -> None:
    base = build(own.bundle).base_sha256
    assert build_work(OWN, dataclasses.replace(own, checkpoint_sha256=base.upper()))
    with pytest.raises(OtherBaseError, match=f"unet.yaml has {base}"):
        build_work(OWN, dataclasses.replace(own, checkpoint_sha256="0" * 64))


def test_names_that_mean_something_else_never_travel() -> None:
    assert travels("named", "a.b", parameters=("*",))
    for name in ("a", "flap_coded", "a b.c", "control/a.b", "a.lora_a", "a.offset_b", "a.", "a..b"):
        assert not travels("named", name, parameters=("*",))
    assert not travels("named", "xa.b", parameters=("a.*",))
    assert not travels("flap", "a.b", parameters=("*",))
    with pytest.raises(ValueError, match="unknown"):
        travels("named", "a.b")


def test_switches_of_sams_encoder_are_off(tmp_path: Path) -> None:
    network = build(write_unet(tmp_path))
    runtime = choose(network, CPU, "bf16", 2, "on", "on", "on")
    assert not runtime.checkpointing
    assert not runtime.packed
    place(network, runtime)
    frozen = {p.dtype for n, p in network.named_parameters() if n.endswith("conv.weight")}
    assert frozen == {torch.bfloat16, torch.float32}  # what trains stays as it is
    with runtime.autocast():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="never changed"):
        network.set_offset({"a.offset_a": torch.zeros(1)})


def test_the_request_to_another_process_names_it(own: Site, tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path)
    folder.ask(build_work(OWN, own), 1)
    assert folder.request() == (OWN, own, 1)


def test_monais_command_trains_it_and_its_file_loads_again(
    own: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.bundle import run

    out = tmp_path / "out"
    run(
        config_file=str(TRAIN_CONFIG),
        logging_file=False,
        profile="demo",
        data_root=str(own.data_root),
        device_name="cpu",
        bundle=str(own.bundle),
        output_dir=str(out),
        **SETTINGS,
    )
    tensors, spec, _ = load_update(out / "adapter_last.safetensors")
    work = build_work(OWN, own)
    for index in range(OWN.rounds):
        work.train(index)
    assert spec == work.spec()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in work.adapter().items())
    assert json.loads((out / "scores.json").read_text())["federation"]["parameters"] == [*NAMED]

    with pytest.raises(MissingCheckpointError):
        load_trained(out / "adapter_last.safetensors")
    monkeypatch.setenv(BUNDLE_VARIABLE, str(own.bundle))
    network = load_trained(out / "adapter_last.safetensors").network
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(image), work.network.eval()(image))
    seeded = write_unet(tmp_path, "channels: [4, 8, 16]", "channels: [4, 8, 32]")
    monkeypatch.setenv(BUNDLE_VARIABLE, str(seeded))
    with pytest.raises(OtherBaseError, match=r"unet\.yaml has"):
        load_trained(out / "adapter_last.safetensors")


def test_the_example_is_a_network(tmp_path: Path) -> None:
    network = build(CONFIGS / "basic_unet.yaml", parameters=("upcat_1.*", "final_conv.*"))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"upcat_1", "final_conv"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("SegResNet, spatial_dims: 2, init_filters: 8", ("conv_final.*",)),
        ("AttentionUnet, spatial_dims: 2, channels: [4, 8], strides: [2]", ("model.2.*",)),
    ],
)
def test_other_networks_of_monai_train(
    own: Site, tmp_path: Path, text: str, names: tuple[str, ...]
) -> None:
    text = f"network_def: {{_target_: monai.networks.nets.{text}, in_channels: 3, out_channels: 3}}"
    file = write_unet(tmp_path, UNET, text)
    federation = dataclasses.replace(OWN, rounds=1, local_epochs=1, parameters=names)
    work = build_work(federation, dataclasses.replace(own, bundle=file))
    before = work.adapter()
    work.train(0)
    after = work.adapter()
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": "krum", "hostile": 0, "optimizer": "fedprox"},
        {"rule": "median", "hostile": 0, "optimizer": "fedadam", "server_rate": 0.01},
        {
            "personal": "ditto",
            "optimizer": "scaffold",
            "upload": ["difference", "int8"],
            "download": ["int8"],
        },
    ],
)
def test_rules_optimisers_and_coding_that_go_with_it(
    own: Site, tmp_path: Path, change: dict[str, Any]
) -> None:
    federation = Federation.from_dict({**SETTINGS, **change})
    check(federation)
    sites = {}
    for name in ("A", "B"):
        work = build_work(federation, dataclasses.replace(own, name=name))
        sites[name] = SiteRound(work, tmp_path / name)
    start, state = work.adapter(), federate(sites, federation).state
    assert start.keys() == state.tensors.keys()
    assert all(not torch.equal(start[name], state.tensors[name]) for name in start)
