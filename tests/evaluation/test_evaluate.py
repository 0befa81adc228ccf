"""The command on real NIfTI scans: files, figures, baselines, faults."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_files import write_prostate
from PIL import Image

from flap_nvflare.adapter.update import load_update, save_update
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.cli import main
from flap_nvflare.data import window
from flap_nvflare.evaluation import baselines
from flap_nvflare.evaluation.evaluate import notes
from flap_nvflare.evaluation.models import read_model, read_models, read_run
from flap_nvflare.in_process import federate
from flap_nvflare.in_process import run as experiment
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.site_round import SiteRound

CPU = ["--device", "cpu"]


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def evaluated(run: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with everything in it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run, folder)
    asked = ["--local", "--pooled", "--leave-one-out", "B", *CPU]
    assert main(["evaluate", str(folder), "--data-root", str(scans), *asked]) == 0
    return folder


def test_every_model_is_scored_at_every_site(evaluated: Path) -> None:
    found = read(evaluated)
    assert found["format"] == "flap_nvflare.evaluation.1"
    assert not found["synthetic"]
    kinds = {name: model["kind"] for name, model in found["models"].items()}
    assert kinds == {  # no `last`: it is the best
        "federated": "federated",
        "site_A": "adapter",
        "site_B": "adapter",
        "local_A": "local",
        "local_B": "local",
        "pooled": "pooled",
        "without_B": "left_out",
    }
    for name, model in found["models"].items():
        assert set(model["sites"]) == {"A", "B"}
        trained_on = {"local_A": ["A"], "local_B": ["B"], "without_B": ["A"]}.get(name, ["A", "B"])
        assert model["trained_on"] == trained_on
        for site, score in model["sites"].items():
            assert score["seen"] == (site in trained_on)
            assert len(score["cases"]) == 2
            assert {"dice", "dice_paper", "dice_flamby", "nsd", "hd95", "left_out"} <= score.keys()
        file = evaluated / {
            "federated": "adapter_best.safetensors",
            "site_A": "sites/A.safetensors",
            "site_B": "sites/B.safetensors",
        }.get(name, f"baselines/{name}/{model['adapter']}")
        assert model["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_gain_compares_each_site_with_its_own_adapter(evaluated: Path) -> None:
    found = read(evaluated)
    gain, models = found["collaborative_gain"], found["models"]
    for site in "AB":
        ours = models["federated"]["sites"][site]["dice"]["mean"]
        own = models[f"local_{site}"]["sites"][site]["dice"]["mean"]
        assert gain["sites"][site] == pytest.approx(ours - own)
    assert gain["mean"] == pytest.approx(sum(gain["sites"].values()) / 2)
    alone = found["local_only"]["summary"]["dice"]["mean"]["mean"]
    assert models["federated"]["summary"]["dice"]["mean"]["mean"] - alone == pytest.approx(
        gain["mean"]
    )


def test_the_tables_hold_the_same_figures(evaluated: Path) -> None:
    found = read(evaluated)
    cases = rows(evaluated / "evaluation.csv")
    assert len(cases) == 7 * 2 * 2 * 2  # models, sites, cases, classes
    line = next(row for row in cases if row["model"] == "pooled" and row["class"] == "kidney")
    case = found["models"]["pooled"]["sites"][line["site"]]["cases"][0]
    assert line["case"] == case["case"]
    assert float(line["dice"]) == case["dice"][0]
    assert line["seen"] == "true"
    summary = rows(evaluated / "evaluation_summary.csv")
    (line,) = (
        row
        for row in summary
        if (row["model"], row["figure"], row["class"]) == ("federated", "dice", "mean")
    )
    figure = found["models"]["federated"]["summary"]["dice"]["mean"]
    assert float(line["mean"]) == figure["mean"]
    assert float(line["low"]) == figure["low"]


def test_pictures_are_of_the_worst_case_of_each_site(evaluated: Path) -> None:
    found = read(evaluated)
    assert [picture["site"] for picture in found["pictures"]] == ["A", "B"]
    files = [evaluated / name for name in ("evaluation.json", "evaluation.csv")]
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)  # cases have names there
    for picture in found["pictures"]:
        assert picture["file"].endswith(f"_{picture['slice']}.png")
        assert 1 <= picture["slice"] <= 5
        cases = found["models"]["federated"]["sites"][picture["site"]]["cases"]
        dice = {c["case"]: np.mean([d for d in c["dice"] if d is not None]) for c in cases}
        assert dice[picture["case"]] == min(dice.values())
        assert Image.open(evaluated / picture["file"]).width > 3 * 250


def test_a_mask_that_is_handed_out_gives_the_dice_that_is_written(
    evaluated: Path, run: Path, scans: Path
) -> None:
    model = read_models(run, read_run(run))[0]
    work = build_work(model.federation, Site("B", scans, device="cpu"))
    model.put_on(work)
    by_hand = []

    def count(volume, mask, score) -> None:  # type: ignore[no-untyped-def]
        label, mask = volume.native_label().numpy(), mask.numpy()
        assert mask.shape == label.shape == volume.shape
        both = [(mask == k).sum() + (label == k).sum() for k in (1, 2)]
        shared = [((mask == k) & (label == k)).sum() for k in (1, 2)]
        by_hand.append([2 * s / b if b else None for s, b in zip(shared, both, strict=True)])
        foreground = (mask > 0).sum() + (label > 0).sum()
        whole = 2 * ((mask > 0) & (label > 0)).sum() / (foreground + 1e-5)
        assert score.dice_flamby[0] == pytest.approx(whole)

    work.evaluate("test", surface_tolerance=2.0, on_case=count)
    cases = read(evaluated)["models"]["federated"]["sites"]["B"]["cases"]
    assert [case["dice"] for case in cases] == [pytest.approx(dice) for dice in by_hand]


def test_baselines_are_used_again_and_only_if_made_with_the_same(
    evaluated: Path,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(baselines, "build_work", never)
    again = ["evaluate", str(evaluated), "--data-root", str(scans), "--local", "--sites", "A", *CPU]
    out = tmp_path / "out"
    assert main([*again, "--pictures", "0", "--json", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == read(out)
    before = read(evaluated)["models"]["local_A"]["sites"]["A"]["cases"]
    assert read(out)["models"]["local_A"]["sites"]["A"]["cases"] == before
    assert read(out)["collaborative_gain"]["sites"].keys() == {"A"}
    assert read(out)["pictures"] == []

    changed = evaluated / "baselines" / "local_A" / "made_with.json"
    kept = changed.read_text(encoding="utf-8")
    changed.write_text(kept.replace('"rounds": 2', '"rounds": 3'), encoding="utf-8")
    assert main(again) == 1
    assert "local_A: was made with another federation" in capsys.readouterr().err
    older = json.loads(kept)  # from before there was a choice of grey values
    del older["federation"]["grey_values"]
    changed.write_text(json.dumps(older), encoding="utf-8")
    federation = json.loads((evaluated / "run.json").read_text(encoding="utf-8"))["federation"]
    baselines.claim(
        baselines.Baseline("local_A", "local", ("A",)),
        Federation.from_dict(federation),
        lambda name: Site(name, scans),
        changed.parent,
    )
    changed.write_text(kept, encoding="utf-8")


def test_a_training_that_was_cut_off_goes_on(
    run: Path, scans: Path, federation: Federation, tmp_path: Path
) -> None:
    def disk(name: str) -> Site:
        return Site(name, scans, device="cpu")

    class CutOff(Exception):
        pass

    def cut(share: float) -> None:
        if share > 0.5:
            raise CutOff

    baseline = baselines.Baseline("local_A", "local", ("A",))
    with pytest.raises(CutOff):
        baselines.train(baseline, federation, disk, tmp_path / "cut", cut)
    told: list[float] = []
    baselines.train(baseline, federation, disk, tmp_path / "cut", told.append)
    assert told
    assert min(told) > 0.5  # the first round is not trained again
    baselines.train(baseline, federation, disk, tmp_path / "whole", told.append)
    cut_off, whole = (
        load_update(tmp_path / name / "adapter_last.safetensors")[0] for name in ("cut", "whole")
    )
    assert all(torch.equal(cut_off[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["local", "left_out"])
def test_a_runs_site_leads_no_baseline_out_of_its_folder(kind: str) -> None:
    asked = {"local": (), "left_out": (), kind: ("../../B",)}
    with pytest.raises(ValueError, match="would lead out of baselines"):
        baselines.baselines(("A", "../../B"), pooled=False, **asked)


@pytest.mark.slow
def test_baselines_are_those_of_the_comparison(
    evaluated: Path, scans: Path, federation: Federation, tmp_path: Path
) -> None:
    alone = experiment("alone", federation, scans, ["A", "B"]).tensors
    pooled = experiment("pooled", federation, scans, ["A", "B"]).tensors
    work = build_work(federation, Site("A", scans, device="cpu"))
    without = federate({"A": SiteRound(work, tmp_path)}, federation).state.tensors
    for name, wanted in (
        ("local_A", alone["A"]),
        ("local_B", alone["B"]),
        ("pooled", pooled["pooled"]),
        ("without_B", without),
    ):
        found = load_update(evaluated / "baselines" / name / "adapter_last.safetensors")[0]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_an_adapter_by_itself_is_scored_beside_its_file(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shutil.copy(run / "adapter_best.safetensors", tmp_path / "mine.safetensors")
    asked = ["evaluate", str(file), "--data-root", str(scans), "--split", "validation", *CPU]
    assert main([*asked, "--sites", "B"]) == 0
    found = read(tmp_path / "mine_evaluation")
    assert list(found["models"]) == ["mine"]
    assert found["models"]["mine"]["kind"] == "adapter"
    assert found["models"]["mine"]["sites"]["B"]["seen"] is None
    assert found["split"] == "validation"
    shown = capsys.readouterr().out
    assert "Validation Dice" in shown
    assert "not known without --local" in shown
    assert main([*asked, "--local"]) == 1
    assert "name the folder of a run" in capsys.readouterr().err


def test_scans_in_another_layout(run: Path, tmp_path: Path) -> None:
    root = write_prostate(tmp_path / "prostate", {"HK": [38, 40], "UCL": [1, 2, 3, 32]})
    file = run / "adapter_best.safetensors"
    out = ["--out", str(tmp_path / "out"), *CPU]
    assert main(["evaluate", str(file), "--data-root", str(root), *out]) == 0
    scored = read(tmp_path / "out")["models"]["adapter_best"]["sites"]
    cases = {site: [case["case"] for case in score["cases"]] for site, score in scored.items()}
    assert cases == {"HK": ["HK-Case38"], "UCL": ["UCL-Case01", "UCL-Case32"]}


def test_an_adapter_by_scan_is_scored_and_drawn_without_a_window_of_the_site(
    run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*volumes: object) -> None:
        raise AssertionError("a site's window was read")

    monkeypatch.setattr(window, "foreground_window", never)
    tensors, spec, extra = load_update(run / "adapter_best.safetensors")
    said = json.loads(extra["federation"]) | {"grey_values": "scan"}
    file = tmp_path / "mine.safetensors"
    save_update(file, tensors, spec, {"federation": json.dumps(said)})
    asked = ["evaluate", str(file), "--data-root", str(scans), "--sites", "B", "--pictures", "1"]
    assert main([*asked, *CPU]) == 0
    found = read(tmp_path / "mine_evaluation")
    (drawn,) = found["pictures"]
    picture = np.asarray(Image.open(tmp_path / "mine_evaluation" / drawn["file"]).convert("L"))
    assert len(np.unique(picture)) > 50


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--sites", "Q"], "site 'Q' is none of the data's A, B"),
        (["--tolerance", "0"], "tolerance 0 mm"),
        (["--pictures", "-1"], "less than none"),
        (["--leave-one-out", "Q"], "site 'Q' is none of this run's: A, B"),
        (["--checkpoint-sha256", "ffff"], "only ffff is accepted"),
        (["--data-root", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--out", "/dev/null/out"], "/dev/null/out: cannot be written to"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    run: Path, scans: Path, arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--data-root", str(scans), *CPU, *arguments]) == 1
    said = capsys.readouterr().err
    assert error in said
    assert said.startswith("flap-nvflare evaluate: ")
    assert said.count("\n") == 1
    assert not (run / "evaluation.json").exists()


def test_sams_weights_in_the_environment_are_not_given_to_another_network(
    run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAP_SAM_CHECKPOINT", str(tmp_path / "sam_vit_b.pth"))
    asked = ["--sites", "A", "--pictures", "0", "--out", str(tmp_path / "out"), *CPU]
    assert main(["evaluate", str(run), "--data-root", str(scans), *asked]) == 0


def test_a_split_without_cases_is_named(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "kits"
    shutil.copytree(scans, root)
    table = root / "thresholded_sites.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    few = [line for line in lines if not line.startswith(("case_00000", "case_00001"))]
    table.write_text("\n".join(few) + "\n", encoding="utf-8")
    asked = ["evaluate", str(run), "--data-root", str(root), "--split", "validation", *CPU]
    assert main(asked) == 1
    assert "site A has no validation case to score; leave it out" in capsys.readouterr().err


def test_a_site_with_brackets_in_its_name_is_shown_by_it(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "kits"
    shutil.copytree(scans, root)
    table = root / "thresholded_sites.csv"
    text = table.read_text(encoding="utf-8")
    renamed = text.replace(",B,", ",Anna [north],").replace("_B", "_Anna [north]")
    table.write_text(renamed, encoding="utf-8")
    out = ["--sites", "Anna [north]", "--out", str(tmp_path / "out"), *CPU]
    file = run / "adapter_best.safetensors"
    assert main(["evaluate", str(file), "--data-root", str(root), *out]) == 0
    assert capsys.readouterr().out.count("Anna [north]") == 2  # the worst site, and the matrix


def test_scans_with_more_classes_than_the_adapter_are_refused(
    run: Path, scans: Path, federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one = dataclasses.replace(federation, class_names=("kidney",))
    work = build_work(one, Site("A", scans, device="cpu"))
    said = {"federation": json.dumps(one.to_dict())}
    save_update(tmp_path / "one.safetensors", work.adapter(), work.spec_whole(), said)
    asked = ["evaluate", str(tmp_path / "one.safetensors"), "--data-root", str(scans), *CPU]
    assert main(asked) == 1
    assert "segmentation.nii.gz" in capsys.readouterr().err


def test_a_file_of_other_settings_in_a_run_is_refused(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "run.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["federation"]["learning_rate"] = 0.5
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ValueError, match="was made with learning_rate"):
        read_models(folder, read_run(folder))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is no whole run\.json"):
        read_run(folder)


def test_an_adapter_of_smaller_rank_is_scored_as_it_is(run: Path, scans: Path) -> None:
    model = read_model("x", "adapter", (), run / "adapter_best.safetensors")
    site = Site("A", scans, device="cpu")
    scores = []
    for rank in (2, 4):
        work = build_work(dataclasses.replace(model.federation, rank=rank), site)
        model.put_on(work)
        scores.append(work.evaluate("test").cases)
    assert scores[0] == scores[1]


def test_drawn_factors_of_another_torch_are_refused(
    run: Path, scans: Path, federation: Federation
) -> None:
    frozen = dataclasses.replace(federation, rule="ffa")
    work = build_work(frozen, Site("A", scans, device="cpu"))
    model = read_model("x", "adapter", (), run / "adapter_best.safetensors")
    tensors = {**work.adapter(), **work.fixed()}
    dataclasses.replace(model, tensors=tensors).put_on(work)
    name = next(iter(work.fixed()))
    with pytest.raises(ValueError, match="frozen factors are not those drawn here"):
        dataclasses.replace(model, tensors={**tensors, name: tensors[name] + 1}).put_on(work)


def test_personal_runs_say_what_is_scored_and_what_can_not_be(run: Path, scans: Path) -> None:
    whole = read_run(run)
    assert whole is not None
    assert notes(whole) == []
    for changes, said in (
        ({"personal": "ditto", "gauge": "aligned"}, "shared adapter"),
        ({"site_ranks": {"A": 1}}, "whole rank"),
    ):
        changed = dataclasses.replace(whole.federation, **changes)
        (note,) = notes(dataclasses.replace(whole, federation=changed))
        assert said in note
    assert "not come to its end" in notes(dataclasses.replace(whole, finished=False))[0]
    (baseline,) = baselines.baselines("AB", (), False, "B")
    for changes in ({"personal": "head"}, {"rule": "share_a"}):
        changed = dataclasses.replace(whole.federation, **changes)
        with pytest.raises(ValueError, match=r"share_a|head: a part of what trains never leaves"):
            read_models(run, dataclasses.replace(whole, federation=changed))
    krum = dataclasses.replace(whole.federation, rule="krum")
    with pytest.raises(ValueError, match="needs 5 sites, and 1 would be left"):
        baselines.claim(baseline, krum, lambda name: Site(name, scans), run / "nowhere")
    with pytest.raises(ValueError, match="no site would be left"):
        baselines.baselines("A", (), False, "A")
