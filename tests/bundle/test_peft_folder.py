"""Adapters to Hugging Face PEFT and back, with the real PEFT on the real transformers SAM."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_networks import SETTINGS as OWN_SETTINGS
from own_networks import write_unet
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers_sam import transformers_sam

from flap_nvflare.adapter.factors import LORA_A, LORA_B, pairs
from flap_nvflare.adapter.peft import CONFIG_FILE, MODEL_FILE, PeftError
from flap_nvflare.adapter.update import UpdateSpec, load_update, save_update
from flap_nvflare.bundle.builders import make_network, make_parts
from flap_nvflare.bundle.peft_export import ADAPTER, HEAD_FILE, README_FILE, export_peft
from flap_nvflare.bundle.peft_import import import_peft
from flap_nvflare.bundle.trained import SETTINGS, load_trained
from flap_nvflare.cli import main
from flap_nvflare.sam import tuning
from flap_nvflare.sam.backbone import architecture
from flap_nvflare.sam.checkpoint import PACKAGED, fit_tables, read_checkpoint
from flap_nvflare.sam.head import build_class_decoder
from flap_nvflare.sam.offset import OFFSET_A, OFFSET_B
from flap_nvflare.settings import (
    BUNDLE_VARIABLE,
    Federation,
    OtherBaseError,
    SettingsError,
    Site,
)

SIZE, RANK = 48, 3
SETTINGS_OF_TESTS = Federation.from_dict({"image_size": SIZE, "rank": RANK, "rule": "mean"})
QKV = "image_encoder.blocks.1.attn.qkv"


def adapter(path: Path, **changes: Any) -> Path:
    """An adapter's file as a run writes it, with drawn numbers for all that trains."""
    federation = dataclasses.replace(SETTINGS_OF_TESTS, **changes)
    network, parts = make_network(federation, Site("A", Path())), make_parts(federation)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(parameter.shape, generator=generator) * 0.05
        for name, parameter in tuning.trainable(network, parts).items()
    }
    if parts.offset:
        for end, shape in ((OFFSET_B, (128, 2)), (OFFSET_A, (2, 128))):
            tensors[f"{QKV}.v{end}"] = torch.randn(shape, generator=generator) * 0.1
    spec = UpdateSpec.of(tensors, federation.method, RANK, network.base_sha256)
    extra = {SETTINGS: json.dumps(federation.to_dict()), "round": "7"}
    save_update(path / "adapter_best.safetensors", tensors, spec, extra)
    return path / "adapter_best.safetensors"


def official(federation: Federation) -> dict[str, Tensor]:
    arch = architecture("vit_t")
    return fit_tables(read_checkpoint(PACKAGED, arch)[0], arch, federation.image_size)


def loaded(folder: Path) -> Any:
    """transformers' SAM with the folder's adapter, by PEFT."""
    from peft import PeftModel

    base = transformers_sam(architecture("vit_t"), SIZE, official(SETTINGS_OF_TESTS))
    return PeftModel.from_pretrained(base, str(folder)).eval()


def image() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def class_logits(sam: Any, head: dict[str, Tensor], classes: int) -> Tensor:
    """Encoder and decoder transformer by transformers, the output layers from `head`."""
    decoder = build_class_decoder(architecture("vit_t"), classes)
    names = {name.removeprefix("mask_decoder."): tensor for name, tensor in head.items()}
    assert not decoder.load_state_dict(names, strict=False).unexpected_keys
    x = image()
    embedding = (
        sam.get_image_embeddings(x) + sam.prompt_encoder.no_mask_embed.weight[..., None, None]
    )
    tokens = torch.cat([sam.mask_decoder.iou_token.weight, decoder.mask_tokens.weight])
    out, features = sam.mask_decoder.transformer(
        point_embeddings=tokens.expand(len(x), 1, -1, -1),
        image_embeddings=embedding,
        image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
        attention_similarity=None,
    )
    grid = embedding.shape[-1]
    features = features[:, 0].transpose(1, 2).unflatten(2, (grid, grid))
    masks = decoder.output_upscaling(features)
    mlps = enumerate(decoder.output_hypernetworks_mlps)
    weights = torch.stack([mlp(out[:, 0, 1 + k]) for k, mlp in mlps], dim=1)
    return torch.einsum("nkc,nchw->nkhw", weights, masks)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": "residual"},
        {"rule": "core"},
        {"lora_blocks": 2, "class_names": ("kidney",)},
    ],
    ids=str,
)
def test_peft_on_transformers_sam_computes_what_our_network_does(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    ours = load_trained(adapter(tmp_path, **changes))
    folder = tmp_path / "peft"
    export_peft(ours, folder)
    model = loaded(folder)
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            assert module.scaling == {"default": 1.0}
    with torch.no_grad():
        expected, logits = ours.network.image_encoder(image()), ours.network(image())
    sam = model.base_model.model
    found = sam.get_image_embeddings(image())
    with model.disable_adapter():
        bare = sam.get_image_embeddings(image())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    head = load_file(folder / HEAD_FILE)
    others = class_logits(sam, head, ours.federation.classes)
    torch.testing.assert_close(others, logits, rtol=0, atol=1e-4)
    assert (expected - bare).abs().max() > 1e-3  # the adapter does something


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": "residual"},
        {"rule": "ffa", "base": "random"},
        {"method": "lora"},
        {"method": "lora_decoder", "lora_blocks": 1},
    ],
    ids=str,
)
def test_there_and_back_are_the_same_bytes(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder, back = adapter(tmp_path, **changes), tmp_path / "peft", tmp_path / "back"
    assert main(["export", "peft", str(folder), "--adapter", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == RANK
    assert main(["import", "peft", str(folder), "--out", str(back)]) == 0
    assert "the file that the folder was made from" in capsys.readouterr().out
    assert back.read_bytes() == file.read_bytes()
    readme = (folder / README_FILE).read_text()
    assert load_trained(file).spec.base_sha256 in readme
    assert "{" not in readme


def lora(folder: Path, rank: int = 2, targets: tuple[str, ...] = ("q_proj", "v_proj"), **more: Any):
    """A LoRA that PEFT itself makes and saves, with drawn factors; returns PEFT's products."""
    from peft import LoraConfig, get_peft_model

    base = transformers_sam(architecture("vit_t"), SIZE, official(SETTINGS_OF_TESTS))
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=list(targets), **more)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    products = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_B"):
            weight = module.lora_B["default"].weight.data
            weight.normal_(std=0.1, generator=generator)
            if name.endswith("qkv"):
                weight.chunk(3)[1].zero_()
            products[name] = module.get_delta_weight("default").detach()
    model.save_pretrained(str(folder))
    return products


def our_products(file: Path) -> dict[str, Tensor]:
    tensors, _, _ = load_update(file)
    factors = {name for name in tensors if name.endswith((LORA_A, LORA_B))}
    return {pair.stem: tensors[pair.b] @ tensors[pair.a] for pair in pairs(factors)}


def settings_file(path: Path, **changes: Any) -> str:
    lines = {"profile": "demo", "image_size": SIZE, "rank": RANK, "rule": "mean", **changes}
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    return str(path)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_from_elsewhere_keeps_its_products(
    rslora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = lora(tmp_path, 2, ("qkv", "v_proj"), use_rslora=rslora, alpha_pattern={"qkv": 3})
    out, yaml = tmp_path / "out.safetensors", settings_file(tmp_path / "federation.yaml")
    arguments = ["import", "peft", str(tmp_path), "--out", str(out), "--federation", yaml]
    assert main(arguments) == 0
    assert "the output layers are untrained" in capsys.readouterr().out
    ours = our_products(out)
    for stem, product in ours.items():
        if ".qkv." in stem:
            block = int(stem.split(".")[2])
            q, _, v = theirs[f"vision_encoder.layers.{block}.attn.qkv"].chunk(3)
            expected = q if stem.endswith("q") else v
        elif stem.endswith("v_proj.v"):
            expected = theirs[stem.removesuffix(".v")]
        else:
            expected = torch.zeros_like(product)  # q_proj is adapted here alone
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)
    assert load_trained(out).federation.rank == RANK
    tensors, _, _ = load_update(out)
    assert all(t.any(dim=1).all() for name, t in tensors.items() if name.endswith(LORA_A))


def test_a_higher_rank_is_refused_or_cut_as_asked(tmp_path: Path) -> None:
    theirs = lora(tmp_path, RANK + 2)
    out = tmp_path / "out.safetensors"
    with pytest.raises(PeftError, match=r"mask_decoder.*_proj: has more directions than rank 3.*5"):
        import_peft(tmp_path, out, federation=SETTINGS_OF_TESTS)
    assert not out.exists()
    done = import_peft(tmp_path, out, federation=SETTINGS_OF_TESTS, cut=True)
    product, exact = our_products(out)[f"{done.lost_in}.{done.lost_in[-6]}"], theirs[done.lost_in]
    assert float((product - exact).norm() / exact.norm()) == pytest.approx(done.lost, rel=1e-4)
    best = torch.linalg.svdvals(exact.double())
    assert done.lost == pytest.approx(float(best[RANK:].norm() / best.norm()), rel=1e-4)
    # A product of lower rank than its factors needs no cut.
    tensors = load_file(tmp_path / MODEL_FILE)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[:, 1:] = tensor[:, :1]
    save_file(tensors, tmp_path / MODEL_FILE)
    assert import_peft(tmp_path, out, federation=SETTINGS_OF_TESTS).lost == 0.0


def test_an_adapter_trained_on_in_peft_comes_back(tmp_path: Path) -> None:
    folder, out = tmp_path / "peft", tmp_path / "out"
    export_peft(load_trained(adapter(tmp_path)), folder)
    tensors = load_file(folder / MODEL_FILE)
    key = "base_model.model.vision_encoder.layers.1.attn.qkv.lora_B.weight"
    tensors[key][:128, :RANK] += 1.0  # within the block of q: the layout is still ours
    save_file(tensors, folder / MODEL_FILE)
    done = import_peft(folder, out)
    assert (done.same, done.head, done.lost) == (False, True, 0.0)
    found, _, extra = load_update(out)
    assert torch.equal(found[f"{QKV}.q{LORA_B}"], tensors[key][:128, :RANK])
    assert "round" not in extra
    tensors[key][:128] += 1.0  # the rows of q, in the columns of v as well
    save_file(tensors, folder / MODEL_FILE)
    with pytest.raises(PeftError, match=r"layers\.1\.attn\.qkv: has more directions"):
        import_peft(folder, out)
    tensors[key][128:256, 0] = 1.0
    save_file(tensors, folder / MODEL_FILE)
    with pytest.raises(PeftError, match=r"layers\.1\.attn\.qkv: .*rows of k"):
        import_peft(folder, out)
    tensors[key][128:256, 0] = 0.0
    save_file(tensors, folder / MODEL_FILE)
    wider = dataclasses.replace(SETTINGS_OF_TESTS, rank=2 * RANK)
    assert import_peft(folder, out, federation=wider).head
    a = tensors[key.replace("lora_B", "lora_A")]
    torch.testing.assert_close(our_products(out)[f"{QKV}.q"], tensors[key][:128] @ a)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"base": "random"}, OtherBaseError, "was trained on the base"),
        ({"class_names": ("a", "b", "c")}, PeftError, r"mask_tokens.weight .* has no place"),
        (
            {"lora_blocks": 1},
            PeftError,
            r"layers\.0\.attn\.qkv: the network of the settings has no",
        ),
        ({"method": "decoder"}, SettingsError, "no low-rank adapters"),
        (
            {"arch": "bundle", "method": "named", "parameters": ("a.*",)},
            SettingsError,
            "'named' has no low-rank adapters",
        ),
        ({"rule": "core"}, SettingsError, "product alone"),
        ({"rule": "ffa"}, SettingsError, "as the seed draws it"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    export_peft(load_trained(adapter(tmp_path)), tmp_path / "peft")
    with pytest.raises(error, match=match):
        import_peft(
            tmp_path / "peft",
            tmp_path / "out",
            federation=dataclasses.replace(SETTINGS_OF_TESTS, **changes),
        )
    assert not (tmp_path / "out").exists()


def test_folders_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_trained(adapter(tmp_path))
    with pytest.raises(PeftError, match="holds something already"):
        export_peft(trained, tmp_path)
    assert main(["import", "peft", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "needs adapter_config.json and adapter_model.safetensors" in capsys.readouterr().err
    export_peft(trained, tmp_path / "peft", base_model="someone/sam")
    config = json.loads((tmp_path / "peft" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "someone/sam"
    (tmp_path / "peft" / HEAD_FILE).unlink()
    with pytest.raises(SettingsError, match="--federation FILE"):
        import_peft(tmp_path / "peft", tmp_path / "out")
    bare = adapter(tmp_path, method="decoder")
    with pytest.raises(PeftError, match="'decoder' has no low-rank adapters"):
        export_peft(load_trained(bare), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({SETTINGS: "[1]"}, SettingsError, r"head\.safetensors: its settings can't be read"),
        ({SETTINGS: "{"}, SettingsError, "--federation FILE"),
        ({SETTINGS: '{"other": 1}'}, SettingsError, "setting 'other' is not allowed"),
        ({"shapes": {"nowhere.x": [1]}}, PeftError, "'nowhere.x', which is no part of the network"),
    ],
    ids=str,
)
def test_a_damaged_file_of_the_head_is_named(
    change: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    folder = tmp_path / "peft"
    export_peft(load_trained(adapter(tmp_path)), folder)
    tensors, spec, extra = load_update(folder / HEAD_FILE)
    said = json.loads(extra[ADAPTER])
    said["shapes"] |= change.get("shapes", {})
    settings = change.get(SETTINGS, extra[SETTINGS])
    extra |= {ADAPTER: json.dumps(said), SETTINGS: settings}
    save_update(folder / HEAD_FILE, tensors, spec, extra)
    with pytest.raises(error, match=match):
        import_peft(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_network_than_sam_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUNDLE_VARIABLE, str(write_unet(tmp_path)))
    federation = Federation.from_dict(OWN_SETTINGS)
    network = make_network(federation, Site("A", Path(), bundle=tmp_path / "unet.yaml"))
    tensors = tuning.trainable(network, make_parts(federation))
    spec = UpdateSpec.of(tensors, "named", RANK, network.base_sha256)
    extra = {SETTINGS: json.dumps(federation.to_dict())}
    save_update(tmp_path / "own.safetensors", tensors, spec, extra)
    with pytest.raises(SettingsError, match=r"own\.safetensors: is of a network of one's own"):
        export_peft(load_trained(tmp_path / "own.safetensors"), tmp_path / "peft")
