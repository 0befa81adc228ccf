from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import pytest
import torch

from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.data.errors import DataError
from flap_nvflare.sam.tuning import travels
from flap_nvflare.settings import Federation, SettingsError, Site
from flap_nvflare.training.errors import Stopped, TrainingError

Tensors = dict[str, torch.Tensor]


def same(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_round_trains_what_travels_and_nothing_else(federation: Federation, site: Site) -> None:
    workflow = build_work(federation, site)
    before = {name: tensor.clone() for name, tensor in workflow.network.state_dict().items()}
    told: list[dict[str, float]] = []
    report = workflow.train(0, progress=told.append)
    assert (report.cases, report.slices) == (2, 8)
    assert report.steps == len(told) == told[-1]["steps"] >= 2
    assert report.loss == pytest.approx(sum(step["loss"] for step in told) / len(told))
    changed = {
        name
        for name, tensor in workflow.network.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all(travels(federation.method, name) for name in changed)
    assert list(workflow.adapter()) == sorted(
        name for name in before if travels(federation.method, name)
    )


def test_the_loss_falls_over_a_federation(federation: Federation, site: Site) -> None:
    workflow = build_work(dataclasses.replace(federation, rounds=6, learning_rate=1e-2), site)
    losses = [workflow.train(index).loss for index in range(6)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_split_is_scored_case_by_case(federation: Federation, site: Site) -> None:
    workflow = build_work(federation, site)
    score = workflow.evaluate("test")
    assert [case.case for case in score.cases] == ["case_00003"]
    assert score.class_names == ("kidney", "tumour")
    assert len(score.cases[0].dice) == 2
    (held_out,) = workflow.evaluate("validation").cases
    assert held_out.case in {case.name for case in workflow.cases.validation}
    assert workflow.evaluate("test").cases == score.cases
    with_surface = workflow.evaluate("test", surface_tolerance=2.0)
    assert len(with_surface.cases[0].nsd) == 2
    with pytest.raises(ValueError, match="split 'tset' is unknown"):
        workflow.evaluate("tset")


def test_scoring_does_not_change_what_training_does(federation: Federation, site: Site) -> None:
    plain, scored = build_work(federation, site), build_work(federation, site)
    scored.evaluate("test")
    plain.train(0)
    scored.train(0)
    assert same(plain.adapter(), scored.adapter())


def test_same_seed_same_bytes_and_another_seed_other_bytes(
    federation: Federation, site: Site
) -> None:
    adapters = []
    for seed in (3, 3, 4):
        workflow = build_work(dataclasses.replace(federation, seed=seed), site)
        workflow.train(0)
        adapters.append(workflow.adapter())
        torch.rand(7)  # what others draw from torch's own generator changes nothing
    assert same(adapters[0], adapters[1])
    assert not same(adapters[0], adapters[2])


@pytest.mark.slow
def test_weights_and_views_reach_the_training_whatever_the_workers(
    federation: Federation, site: Site
) -> None:
    results = []
    for changes, workers in (
        ({}, 0),
        ({"loss_weighting": "importance"}, 0),
        ({"loss_weighting": "importance"}, 2),
        ({"augment_views": 1}, 0),
        ({"augment_views": 1}, 2),
    ):
        settings = dataclasses.replace(federation, **changes)
        workflow = build_work(settings, dataclasses.replace(site, workers=workers))
        for index in (0, 1):
            workflow.train(index)
        results.append(workflow.adapter())
    plain, weighted, weighted_too, fixed, fixed_too = results
    assert same(weighted, weighted_too)
    assert same(fixed, fixed_too)
    assert not same(plain, weighted)
    assert not same(plain, fixed)


def test_going_on_from_files_equals_never_having_stopped(
    federation: Federation, site: Site, tmp_path: Path
) -> None:
    whole = build_work(federation, site)
    whole.train(0)
    sent = whole.adapter()
    whole.save_state(tmp_path / "moments.safetensors")
    whole.train(1)
    later = build_work(federation, site)
    later.load_adapter(sent)
    later.load_state(tmp_path / "moments.safetensors", reset_factors=False)
    later.train(1)
    assert same(whole.adapter(), later.adapter())


def test_resetting_factors_changes_the_factors_next_step(
    federation: Federation, site: Site, tmp_path: Path
) -> None:
    workflow = build_work(federation, site)
    workflow.train(0)
    sent = workflow.adapter()
    workflow.save_state(tmp_path / "moments.safetensors")
    results = []
    for reset in (False, True):
        workflow.load_adapter(sent)
        workflow.load_state(tmp_path / "moments.safetensors", reset_factors=reset)
        workflow.train(1)
        results.append(workflow.adapter())
    assert not same(*results)


def test_a_run_without_a_file_forgets_the_last_one(federation: Federation, site: Site) -> None:
    fresh, used = build_work(federation, site), build_work(federation, site)
    start = used.adapter()
    used.train(0)
    used.load_adapter(start)
    used.reset_state()
    fresh.train(0)
    used.train(0)
    assert same(fresh.adapter(), used.adapter())


def test_half_precision_trains_whole_weights(federation: Federation, site: Site) -> None:
    results = {}
    for precision in ("fp32", "bf16"):
        settings = dataclasses.replace(federation, precision=precision, augment=False)
        workflow = build_work(settings, site)
        results[precision] = workflow.train(0).loss
        assert {tensor.dtype for tensor in workflow.adapter().values()} == {torch.float32}
        assert workflow.evaluate("test").dice is not None
    assert results["bf16"] == pytest.approx(results["fp32"], rel=0.05)
    assert results["bf16"] != results["fp32"]


def test_stopping_takes_less_than_a_second(federation: Federation, site: Site) -> None:
    workflow = build_work(dataclasses.replace(federation, local_epochs=1000), site)
    asked: list[float] = []

    def should_stop() -> bool:
        if len(asked) >= 5:
            asked.append(time.monotonic())
            return True
        asked.append(0.0)
        return False

    with pytest.raises(Stopped, match="site A"):
        workflow.train(0, should_stop)
    assert time.monotonic() - asked[-1] < 1.0
    with pytest.raises(Stopped):
        workflow.evaluate("test", lambda: True)


def test_a_loss_that_is_no_number_is_refused(federation: Federation, site: Site) -> None:
    workflow = build_work(federation, site)
    broken = workflow.adapter()
    name = next(iter(broken))
    broken[name] = torch.full_like(broken[name], float("nan"))
    workflow.load_adapter(broken)
    with pytest.raises(TrainingError, match=r"site A, round 1, step 1 of \d+: the loss is nan"):
        workflow.train(1)


def test_a_round_outside_the_federation_is_refused(federation: Federation, site: Site) -> None:
    with pytest.raises(ValueError, match="round 2 is none of the federation's 2"):
        build_work(federation, site).train(2)


def test_only_a_whole_adapter_is_loaded(federation: Federation, site: Site) -> None:
    workflow = build_work(federation, site)
    own = workflow.adapter()
    first = next(iter(own))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    for bad, match in (
        ({name: tensor for name, tensor in zeros.items() if name != first}, "lacks"),
        ({**zeros, "image_encoder.frozen": torch.zeros(1)}, "does not travel"),
        ({**zeros, first: torch.zeros(1, 1, 1)}, "has shape"),
    ):
        with pytest.raises(ValueError, match=match):
            workflow.load_adapter(bad)
        assert same(workflow.adapter(), own)
    workflow.load_adapter(zeros)
    assert same(workflow.adapter(), zeros)


def test_no_scan_is_read_before_it_is_needed(federation: Federation, tmp_path: Path) -> None:
    workflow = build_work(federation, Site("A", tmp_path / "nowhere", device="cpu"))
    assert workflow.spec().shapes.keys() == workflow.adapter().keys()
    with pytest.raises(DataError, match="nowhere: no such folder"):
        workflow.train(0)


def test_each_scan_is_read_once(
    federation: Federation, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flap_nvflare.data import prepared, volume

    read: list[str] = []
    load = volume.load_volume
    for module in (prepared, volume):
        monkeypatch.setattr(
            module, "load_volume", lambda case, count: read.append(case.name) or load(case, count)
        )
    workflow = build_work(federation, site)
    workflow.train(0)
    assert read == [case.name for case in workflow.cases.train]
    for index in (0, 1):
        workflow.train(index)
        workflow.evaluate("validation")
        workflow.evaluate("test")
    assert len(read) == len(set(read)) == 4


def test_pooled_sites_are_trained_as_one(federation: Federation, scans: Path) -> None:
    pooled = build_work(federation, Site("A+B", scans, device="cpu"))
    report = pooled.train(0)
    assert (report.cases, report.slices) == (4, 2 * 4 + 2 * 5)
    assert [case.case for case in pooled.evaluate("test").cases] == ["case_00003", "case_00007"]
    cases = {case.name: case for case in pooled.data.prepared("test")}
    for name in ("A", "B"):
        alone = build_work(federation, Site(name, scans, device="cpu"))
        (case,) = alone.data.prepared("test")
        assert torch.equal(cases[case.name].images, case.images)
        assert pooled.data.window(name) == alone.data.window(name)
    assert pooled.data.window("A") != pooled.data.window("B")


def test_text_of_the_settings_is_never_run(
    federation: Federation, site: Site, tmp_path: Path
) -> None:
    trap = f"$__import__('pathlib').Path({str(tmp_path / 'trap')!r}).touch()"
    names = (trap, "@network")
    with pytest.raises(SettingsError, match="class_names"):
        dataclasses.replace(federation, class_names=names)
    past_the_check = dataclasses.replace(federation)
    object.__setattr__(past_the_check, "class_names", names)
    workflow = build_work(past_the_check, site)
    assert workflow.evaluate("test").class_names == names
    assert not (tmp_path / "trap").exists()


def test_a_site_accepts_only_its_own_base(federation: Federation, site: Site) -> None:
    base = build_work(federation, site).spec().base_sha256
    build_work(federation, dataclasses.replace(site, checkpoint_sha256=base.upper()))
    with pytest.raises(SettingsError, match="accepts only the base with SHA-256 00ff"):
        build_work(federation, dataclasses.replace(site, checkpoint_sha256="00ff"))


def test_others_keep_their_loggers(federation: Federation, site: Site) -> None:
    other = logging.getLogger("a.hospital.of.its.own")
    root = list(logging.getLogger().handlers), logging.getLogger().level
    build_work(federation, site)
    assert not other.disabled
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == root
