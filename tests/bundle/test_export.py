"""The written bundle, used as its README says, by MONAI's own commands."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import jsonschema
import nibabel
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from flap_nvflare.adapter.update import load_update, save_update
from flap_nvflare.bundle.alone import Alone
from flap_nvflare.bundle.export import filled
from flap_nvflare.bundle.trained import load_trained
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.cli import main
from flap_nvflare.data.scan import open_scan
from flap_nvflare.data.slices import volume_batches
from flap_nvflare.sam.merged import plain_segmenter
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.metrics import score_case
from flap_nvflare.training.volume_scorer import native_masks
from flap_nvflare.training.work import SiteWork

SCHEMA = Path(__file__).parent / "metadata_schema.json"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def work(federation: Federation, site: Site) -> SiteWork:
    """Site A after a round on the packaged small SAM."""
    settings = dataclasses.replace(
        federation, base="pretrained", image_size=96, rounds=1, local_epochs=3
    )
    work = build_work(settings, site)
    work.train(0)
    return work


@pytest.fixture(scope="module")
def run_folder(work: SiteWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the server of a federation leaves it: best adapter with its score, and what ran."""
    folder = tmp_path_factory.mktemp("run")
    extra = {"federation": json.dumps(work.federation.to_dict()), "score": "0.4321"}
    save_update(folder / "adapter_best.safetensors", work.adapter(), work.spec_whole(), extra)
    (folder / "run.json").write_text(json.dumps({"data": "synthetic"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bundle(run_folder: Path, work: SiteWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written with the grey window of site A."""
    out = tmp_path_factory.mktemp("zoo") / "kidney_sam"
    window = work.data.window("A")
    numbers = [str(value) for value in dataclasses.astuple(window)]
    assert main(["export", "bundle", str(out), "--adapter", str(run_folder),
                 "--window", *numbers]) == 0  # fmt: skip
    return out


def commands(bundle: Path) -> list[str]:
    """What the bundle's README says to type."""
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)
            for line in block.splitlines()]  # fmt: skip


def type_in(
    bundle: Path, part: str, monkeypatch: pytest.MonkeyPatch, scans: Path, *more: str
) -> None:
    """Runs the README's one command that holds `part`, in the bundle's folder."""
    (line,) = (one for one in commands(bundle) if part in one and "torchrun" not in one)
    words = shlex.split(line.replace("SCANS", str(scans)).replace("KITS", str(scans)))
    assert words[:3] == ["python", "-m", "monai.bundle"]
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(sys, "argv", [*words[2:], *more])
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def test_its_files_are_those_of_the_model_zoo(bundle: Path, run_folder: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    configs = ("train", "evaluate", "inference", "multi_gpu_train")
    assert files >= {
        *(f"configs/{name}.yaml" for name in configs),
        "configs/metadata.json", "configs/logging.conf",
        "docs/README.md", "docs/data_license.txt", "LICENSE",
        "models/model.pt", "models/model.safetensors", "models/adapter.safetensors",
    }  # fmt: skip
    assert (bundle / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    adapter = (run_folder / "adapter_best.safetensors").read_bytes()
    assert (bundle / "models" / "adapter.safetensors").read_bytes() == adapter
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    assert "0.432" in text
    assert "synthetic scans drawn from a seed by flap_nvflare, at one site or at all" in text
    assert "nothing low-rank is left at run time" in text
    assert "$" not in text


def test_its_weights_are_merged_and_give_the_same_numbers(bundle: Path, run_folder: Path) -> None:
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    again = load_file(bundle / "models" / "model.safetensors")
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not any("lora" in name or "offset" in name for name in state)
    plain = plain_segmenter("vit_t", 96, 2)
    plain.load_state_dict(state)
    image = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (plain(image) - load_trained(run_folder).network(image)).abs().max()
    assert difference < 1e-5


def test_inference_gives_the_masks_that_evaluation_scores(
    bundle: Path, work: SiteWork, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(bundle, "inference.yaml --dataset_dir", monkeypatch, scans,
            "--pattern", "*/imaging.nii.gz", "--output_dir", "masks",
            "--device_name", "cpu")  # fmt: skip
    network = plain_segmenter("vit_t", 96, 2)
    network.load_state_dict(load_file(bundle / "models" / "model.safetensors"))
    (case,) = work.data.prepared("test")
    file = nibabel.load(bundle / "masks" / case.name / "imaging_seg.nii.gz")
    scan = nibabel.load(scans / case.name / "imaging.nii.gz")
    assert np.array_equal(file.affine, scan.affine)
    assert file.get_data_dtype() == np.uint8
    mask = open_scan(Path(file.get_filename())).whole().astype(np.uint8)  # from head to feet
    with torch.no_grad():
        ours = torch.cat(
            [native_masks(network(images), case.shape[1:])
             for images, _ in volume_batches(case, "repeat", 3)]
        )  # fmt: skip
    assert np.array_equal(mask, ours.numpy())
    assert set(np.unique(mask)) == {0, 1, 2}
    score = score_case(
        case.name, torch.from_numpy(mask.copy()), case.native_label(), 2, case.spacing
    )
    assert score == work.evaluate("test").cases[0]


def test_a_mask_lies_on_the_grid_of_its_scan(
    bundle: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = nibabel.load(scans / "case_00003" / "imaging.nii.gz")
    turned = scan.as_reoriented(nibabel.orientations.axcodes2ornt("SPR"))
    turned.set_qform(turned.affine, 1)
    turned.set_sform(turned.affine, 2)
    (tmp_path / "in").mkdir()
    nibabel.save(scan, tmp_path / "in" / "plain.nii.gz")
    nibabel.save(turned, tmp_path / "in" / "turned.nii.gz")
    type_in(bundle, "inference.yaml --dataset_dir", monkeypatch, tmp_path / "in",
            "--output_dir", str(tmp_path / "out"), "--device_name", "cpu")  # fmt: skip
    plain, other = (
        nibabel.load(tmp_path / "out" / f"{name}_seg.nii.gz") for name in ("plain", "turned")
    )
    assert np.array_equal(other.affine, nibabel.load(tmp_path / "in" / "turned.nii.gz").affine)
    assert (int(other.header["qform_code"]), int(other.header["sform_code"])) == (1, 2)
    back = other.as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.io_orientation(other.affine), nibabel.io_orientation(plain.affine)
        )
    )
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(plain.dataobj))


def test_training_and_evaluation_go_on_with_its_settings(
    bundle: Path, work: SiteWork, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAP_SAM_CHECKPOINT", "")
    type_in(bundle, "evaluate.yaml", monkeypatch, scans, "--output_dir", "scored",
            "--device_name", "cpu")  # fmt: skip
    scores = json.loads((bundle / "scored" / "scores.json").read_text(encoding="utf-8"))
    expected = work.evaluate("test").to_dict()
    assert scores["test"]["cases"] == expected["cases"]
    type_in(bundle, "run --config_file configs/train.yaml", monkeypatch, scans,
            "--output_dir", "trained", "--device_name", "cpu")  # fmt: skip
    tensors, spec, extra = load_update(bundle / "trained" / "adapter_last.safetensors")
    assert Federation.from_dict(json.loads(extra["federation"])) == work.federation
    assert spec == work.spec_whole()
    assert all(torch.equal(tensors[name], value) for name, value in work.adapter().items())


def test_monai_verifies_metadata_and_network(
    bundle: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "eval").mkdir(exist_ok=True)
    shutil.copyfile(SCHEMA, bundle / "eval" / "schema.json")  # found there, it is not fetched
    type_in(bundle, "verify_metadata", monkeypatch, scans)
    type_in(bundle, "verify_net_in_out", monkeypatch, scans, "--device", "cpu")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["eval_metrics"] == {"validation_mean_dice": 0.4321}
    assert "synthetic" in metadata["data_source"]
    for place, value in (("spatial_shape", "96"), ("channel_def", {}), ("format", "picture")):
        wrong = json.loads(json.dumps(metadata))
        wrong["network_data_format"]["outputs"]["pred"][place] = value
        (bundle / "eval" / "wrong.json").write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(ValueError, match="Failed validating"):
            type_in(bundle, "verify_metadata", monkeypatch, scans, "--meta_file", "eval/wrong.json")


def test_monai_exports_torchscript(
    bundle: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.data import load_net_with_metadata

    type_in(bundle, "ckpt_export", monkeypatch, scans)
    script, metadata, more = load_net_with_metadata(
        str(bundle / "models" / "model.ts"), more_extra_files=["inference.json"]
    )
    assert metadata == json.loads((bundle / "configs" / "metadata.json").read_text("utf-8"))
    assert json.loads(more["inference.json"])["arch"] == "vit_t"
    _same_as_the_weights(bundle, lambda image: script(image), images=3)


@pytest.mark.slow
def test_monai_exports_onnx(bundle: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    type_in(bundle, "onnx_export", monkeypatch, scans)
    session = onnxruntime.InferenceSession(bundle / "models" / "model.onnx")
    (given,) = session.get_inputs()
    assert given.shape == [1, 3, 96, 96]
    _same_as_the_weights(
        bundle, lambda image: torch.from_numpy(session.run(None, {given.name: image.numpy()})[0]), 1
    )


def _same_as_the_weights(bundle: Path, exported: object, images: int) -> None:
    network = plain_segmenter("vit_t", 96, 2)
    network.load_state_dict(load_file(bundle / "models" / "model.safetensors"))
    image = torch.randn(images, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(exported(image), network(image), rtol=1e-5, atol=1e-5)  # type: ignore[operator]


def test_its_inference_has_what_monai_asks_for(bundle: Path, scans: Path) -> None:
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        str(bundle / "configs" / "inference.yaml"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(bundle),
        dataset_dir=str(scans),
        pattern="*/imaging.nii.gz",
    )
    workflow.initialize()
    assert not workflow.check_properties()
    batch = next(iter(workflow.dataset))
    assert batch["image"].shape == (4, 3, 96, 96)


def test_a_change_of_the_base_is_merged_and_evaluated(
    work: SiteWork, run_folder: Path, scans: Path, site: Site, tmp_path: Path
) -> None:
    tensors, spec, extra = load_update(run_folder / "adapter_best.safetensors")
    stem = "image_encoder.blocks.1.attn.qkv.v"
    draw = torch.Generator().manual_seed(4)
    tensors[f"{stem}.offset_a"] = torch.randn(3, 128, generator=draw)
    tensors[f"{stem}.offset_b"] = 0.1 * torch.randn(128, 3, generator=draw)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    file = tmp_path / "changed.safetensors"
    save_update(file, tensors, dataclasses.replace(spec, shapes=shapes), extra)
    out = tmp_path / "bundle"
    assert main(["export", "bundle", str(out), "--adapter", str(file)]) == 0
    weights = f"{stem.removesuffix('.v')}.weight"
    state = load_file(out / "models" / "model.safetensors")
    whole = load_trained(file).network
    product = whole.image_encoder.blocks[1].attn.qkv.merged()
    assert torch.equal(state[weights], product)
    plain = load_trained(run_folder).network.image_encoder.blocks[1].attn.qkv.merged()
    expected = tensors[f"{stem}.offset_b"] @ tensors[f"{stem}.offset_a"]
    torch.testing.assert_close((product - plain)[256:], expected, rtol=1e-4, atol=1e-5)

    alone = Alone(build_work(work.federation, site), tmp_path / "scored")
    before = alone.evaluate(run_folder / "adapter_best.safetensors", "test")["test"]["dice"]
    assert alone.evaluate(file, "test")["test"]["dice"] != before
    assert alone.work.network.offset.keys() == {f"{stem}.offset_a", f"{stem}.offset_b"}


def test_what_cannot_be_exported_is_one_line(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    tensors, spec, extra = load_update(run_folder / "adapter_best.safetensors")
    settings = json.loads(extra["federation"]) | {"class_names": ["liver", "spleen"]}
    other = tmp_path / "liver.safetensors"
    save_update(other, tensors, spec, {"federation": json.dumps(settings)})
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copyfile(run_folder / "adapter_best.safetensors", damaged / "adapter_best.safetensors")
    (damaged / "run.json").write_text("{", encoding="utf-8")
    for arguments, match in (
        ([str(tmp_path / "full"), "--adapter", str(run_folder)], "exists already"),
        ([".", "--adapter", str(run_folder)], "name a folder that does not"),
        ([str(tmp_path / "a"), "--adapter", str(damaged)], "run.json: is no JSON"),
        ([str(tmp_path / "a"), "--adapter", str(tmp_path / "none")], "there is no such adapter"),
        ([str(tmp_path / "a"), "--adapter", str(other)], "have no usual grey values"),
        ([str(tmp_path / "a"), "--adapter", str(run_folder), "--window", "5", "1", "0", "1"],
         "cannot be used"),
    ):  # fmt: skip
        assert main(["export", "bundle", *arguments]) == 1
        error = capsys.readouterr().err
        assert match in error
        assert error.strip().count("\n") == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "damaged", "full", "liver.safetensors",
    ]  # fmt: skip


def test_a_method_without_adapters_is_called_so(
    federation: Federation, site: Site, tmp_path: Path
) -> None:
    settings = dataclasses.replace(federation, method="decoder", rule="mean")
    work = build_work(settings, site)
    extra = {"federation": json.dumps(settings.to_dict()), "score": '"high"'}
    file = tmp_path / "adapter.safetensors"
    save_update(file, work.adapter(), work.spec_whole(), extra)
    assert main(["export", "bundle", str(tmp_path / "out"), "--adapter", str(file)]) == 0
    text = (tmp_path / "out" / "docs" / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned by method `decoder` (rule `mean`" in text
    assert "low-rank" not in text.replace("federated learning of low-rank adapters", "")
    metadata = json.loads((tmp_path / "out" / "configs" / "metadata.json").read_text("utf-8"))
    assert metadata["eval_metrics"] == {"validation_mean_dice": None}  # that is no number


def test_the_window_is_the_one_asked_for(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, low, note in (
        ([], -73.7, "mean over the sites of Fed-KiTS2019"),
        (["--site", "B"], -77.0, "site B of Fed-KiTS2019"),
    ):
        out = tmp_path / str(low)
        capsys.readouterr()
        assert (
            main(["export", "bundle", str(out), "--adapter", str(run_folder), "--json", *more]) == 0
        )
        said = json.loads(capsys.readouterr().out)
        assert note in said["window"]
        assert said["bytes"]["models/model.pt"] == (out / "models" / "model.pt").stat().st_size
        config = yaml.safe_load((out / "configs" / "inference.yaml").read_text(encoding="utf-8"))
        assert config["window_low"] == low
        assert f"[{low:g}, " in (out / "docs" / "README.md").read_text(encoding="utf-8")


def test_only_top_level_lines_are_filled() -> None:
    text = "rank: null   # of the adapters\nnames: null\npart:\n  rank: '@rank'\n"
    assert filled(text, {"rank": 8, "names": ["a b", "c"]}) == (
        "rank: 8   # of the adapters\nnames: [a b, c]\npart:\n  rank: '@rank'\n"
    )
    assert yaml.safe_load(filled("rate: 1\n", {"rate": 1e-5})) == {"rate": 1e-5}
    with pytest.raises(KeyError, match="rule has 0 lines"):
        filled(text, {"rule": "svd"})


def test_a_bundle_by_scan_has_no_window_to_put_in(
    federation: Federation,
    site: Site,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = dataclasses.replace(
        federation, base="pretrained", grey_values="scan", class_names=("gland", "lesion")
    )
    work = build_work(settings, site)
    work.train(0)
    file, out = tmp_path / "adapter.safetensors", tmp_path / "bundle"
    extra = {"federation": json.dumps(settings.to_dict())}
    save_update(file, work.adapter(), work.spec_whole(), extra)
    asked = ["export", "bundle", str(out), "--adapter", str(file)]
    assert main([*asked, "--site", "A"]) == 1
    assert "there is no window to choose" in capsys.readouterr().err
    assert main(asked) == 0
    assert "Grey window: of each scan itself" in capsys.readouterr().out

    train, inference = (
        yaml.safe_load((out / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("train", "inference")
    )
    assert train["grey_values"] == inference["grey_values"] == "scan"
    assert inference["window_low"] is inference["window_std"] is None
    metadata = json.loads((out / "configs" / "metadata.json").read_text(encoding="utf-8"))
    jsonschema.validate(metadata, json.loads(SCHEMA.read_text(encoding="utf-8")))
    text = (out / "docs" / "README.md").read_text(encoding="utf-8")
    for said in (text, json.dumps(metadata)):
        assert " CT " not in said
        assert "HU" not in said.replace("Apache-2.0; the scans of KiTS19", "")

    type_in(out, "inference.yaml --dataset_dir", monkeypatch, scans,
            "--pattern", "*/imaging.nii.gz", "--output_dir", "masks",
            "--device_name", "cpu")  # fmt: skip
    network = plain_segmenter("vit_t", 32, 2)
    network.load_state_dict(load_file(out / "models" / "model.safetensors"))
    (case,) = work.data.prepared("test")
    mask = open_scan(out / "masks" / case.name / "imaging_seg.nii.gz").whole()
    with torch.no_grad():
        ours = [native_masks(network(images), case.shape[1:])
                for images, _ in volume_batches(case, "repeat", 8)]  # fmt: skip
    assert np.array_equal(mask, torch.cat(ours).numpy())
    assert mask.any()
