from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from flap_nvflare.adapter.update import UpdateError, load_update, save_update
from flap_nvflare.bundle.alone import Alone
from flap_nvflare.bundle.trained import load_trained, weights_file
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.sam.segmenter import Segmenter
from flap_nvflare.settings import Federation, OtherBaseError, Site


@pytest.fixture(scope="module")
def trained(federation: Federation, site: Site, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("run")
    work = build_work(dataclasses.replace(federation, rounds=1), site)
    Alone(work, folder).train()
    return folder, work


def logits(network: Segmenter) -> torch.Tensor:
    size = network.image_size
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(image)


def test_the_network_of_a_file_is_the_one_that_was_trained(trained: tuple) -> None:
    folder, work = trained
    whole = load_trained(folder / "adapter_last.safetensors")
    assert whole.federation == work.federation
    assert whole.extra["round"] == 0
    torch.testing.assert_close(logits(whole.network), logits(work.network), rtol=1e-4, atol=1e-4)
    assert not whole.network.training


def test_a_folder_names_its_best_adapter(trained: tuple, tmp_path: Path) -> None:
    assert load_trained(trained[0]).file.name == "adapter_best.safetensors"
    with pytest.raises(UpdateError, match="there is no such adapter"):
        load_trained(tmp_path)
    (tmp_path / "adapter_last.safetensors").touch()
    with pytest.raises(UpdateError, match=r"an unfinished run has .*adapter_last\.safetensors"):
        load_trained(tmp_path)


def test_another_base_is_refused(trained: tuple) -> None:
    with pytest.raises(OtherBaseError, match="only ffff is accepted"):
        load_trained(trained[0], sha256="FFFF")


def test_what_is_no_whole_adapter_is_refused(trained: tuple, tmp_path: Path) -> None:
    folder, _ = trained
    tensors, spec, extra = load_update(folder / "adapter_last.safetensors")
    save_update(tmp_path / "bare.safetensors", tensors, spec)
    with pytest.raises(UpdateError, match="hold no settings"):
        load_trained(tmp_path / "bare.safetensors")

    save_update(tmp_path / "later.safetensors", tensors, spec, {**extra, "federation": '{"a": 1}'})
    with pytest.raises(UpdateError, match=r"later.safetensors: setting 'a' is not allowed"):
        load_trained(tmp_path / "later.safetensors")

    name = next(iter(tensors))
    frozen = "image_encoder.patch_embed.proj.bias"
    base = load_trained(folder).network.state_dict()[frozen]
    for change, match in (
        ({}, f"{name} is missing"),
        ({name: torch.zeros(1)}, f"{name} is \\(1,\\)"),
        ({name: tensors[name], "sealed": torch.zeros(1)}, "sealed is no part of the network"),
        ({name: tensors[name], frozen: base + 1}, f"{frozen} is part of the frozen base"),
    ):
        changed = {**{k: t for k, t in tensors.items() if k != name}, **change}
        shapes = {key: tuple(tensor.shape) for key, tensor in changed.items()}
        save_update(tmp_path / "x", changed, dataclasses.replace(spec, shapes=shapes), extra)
        with pytest.raises(UpdateError, match=match):
            load_trained(tmp_path / "x")


def test_the_weights_are_the_given_ones_or_the_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLAP_SAM_CHECKPOINT", "sam.pth")
    large = Federation(arch="vit_b")
    assert weights_file(large) == "sam.pth"
    assert weights_file(large, Path("other.pth")) == "other.pth"
    for needs_none in (Federation(), Federation(arch="vit_b", base="random")):
        assert weights_file(needs_none) == ""
    monkeypatch.delenv("FLAP_SAM_CHECKPOINT")
    assert weights_file(large) == ""
