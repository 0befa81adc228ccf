"""The server's job: opened, written each round, and gone on with after a kill."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvflare.apis.fl_context import FLContext
from wire import DOWNLOAD, SETTINGS, UPLOAD

from flap_nvflare.adapter.guard import Refusal
from flap_nvflare.adapter.update import UpdateError
from flap_nvflare.aggregation.server import ServerState
from flap_nvflare.flare.controller import FlapController
from flap_nvflare.flare.job import ServerJob, open_job, save_round, server_job
from flap_nvflare.flare.run import RunFolder
from flap_nvflare.sam.tuning import count
from flap_nvflare.settings import SettingsError

SITES = ("A", "B", "C")
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAP_HOME", str(tmp_path))
    for name in ("FLAP_RESUME", "FLAP_SAM_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def opened(monkeypatch: pytest.MonkeyPatch, resume: bool = False, **changes: Any) -> ServerJob:
    monkeypatch.setenv("FLAP_RESUME", "last" if resume else "")
    settings = {**SETTINGS.to_dict(), **changes}
    context = FLContext()
    job = open_job(context, "fed_kits", settings, SITES)
    assert server_job(context) is job
    if not resume:
        job.write_description()
    return job


def like(tensors: Tensors, seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=random) for name, t in sorted(tensors.items())}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def finish_round(job: ServerJob, index: int, state: ServerState | None = None) -> None:
    """A round whose aggregation gave `state`."""
    job.begin_round(index)
    job.ledger.add(index, "A", "up", 100 + index)
    job.ledger.add(index, "A", "down", 200)
    job.reports["A"] = {"steps": 1, "dice": {}}
    job.state = state or ServerState(like(job.state.tensors, index))
    save_round(job, index)


def test_all_that_the_server_remembers_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"rule": "residual", "optimizer": "scaffold", "download": list(DOWNLOAD)}
    job = opened(monkeypatch, **settings)
    first = dict(job.state.tensors)
    stem = next(name for name in first if name.endswith(".lora_b")).removesuffix(".lora_b")
    rows, columns = first[f"{stem}.lora_b"].shape[0], first[f"{stem}.lora_a"].shape[1]
    state = ServerState(
        tensors=like(first, 1),
        offset={
            f"{stem}.offset_b": torch.ones(rows, 1),
            f"{stem}.offset_a": torch.ones(1, columns),
        },
        control=like(first, 2),
        memory={"rule/total": torch.ones(2), "optimizer/first/x": torch.zeros(3)},
        turned=True,
    )
    finish_round(job, 0)
    finish_round(job, 1, state)
    held = dict(job.downlink.held)
    assert not same(held, job.state.tensors)

    again = opened(monkeypatch, resume=True, **settings)
    assert again.start_round == 2
    for part in ("tensors", "offset", "control", "memory"):
        assert same(getattr(again.state, part), getattr(state, part)), part
    assert again.state.turned
    assert same(again.downlink.held, held)
    assert [path.name for path in again.folder.path.glob("server_*")] == ["server_2.safetensors"]

    # What the sites hold in the next round is the same, though each now gets it whole.
    job.downlink.answered("A")
    for one in (job, again):
        one.begin_round(2)
    assert same(again.downlink.held, job.downlink.held)
    assert len(again.downlink.message("A")) > 10 * len(job.downlink.message("A"))
    assert again.downlink.message("A") == job.downlink.message("B")


def test_equal_states_have_equal_bytes(home: Path) -> None:
    shared = torch.arange(4.0)
    tensors = {"memory/b": shared[:2], "memory/a": shared, "control/x": torch.ones(2, 2).mT}
    files = set()
    for number in range(20):  # of two texts beside the tensors each would be first now and then
        folder = home / str(number)
        folder.mkdir()
        order = sorted(tensors, reverse=bool(number % 2))
        RunFolder(folder).save_state(3, {name: tensors[name] for name in order}, turned=True, a=1)
        files.add((folder / "server_3.safetensors").read_bytes())
    assert len(files) == 1
    found, extra = RunFolder(folder).load_state(3)
    assert same(found, tensors)
    assert extra == {"turned": True, "a": 1}


def test_a_state_that_did_not_turn_comes_back_so(monkeypatch: pytest.MonkeyPatch) -> None:
    finish_round(opened(monkeypatch, rule="mean"), 0)
    assert not opened(monkeypatch, resume=True, rule="mean").state.turned


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rule", "mean"),
        ("seed", 7),
        ("upload", ["int8"]),
        ("download", list(DOWNLOAD)),
        ("optimizer", "fedadam"),
        ("sites_per_round", 2),
        ("dp_clip", 1.0),
        ("site_ranks", {"A": 1}),
    ],
)
def test_a_run_does_not_go_on_with_another_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    finish_round(opened(monkeypatch, upload=list(UPLOAD)), 0)
    with pytest.raises(SettingsError, match=f"setting {name}: .*restore it or start a new run"):
        opened(monkeypatch, resume=True, **{"upload": list(UPLOAD), name: value})


def test_a_run_from_before_a_setting_was_made_with_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = opened(monkeypatch)
    finish_round(job, 0)
    path = job.folder.path / "run.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    del said["federation"]["grey_values"]
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"setting grey_values: 'scan'.* made with 'site'"):
        opened(monkeypatch, resume=True, grey_values="scan")
    assert opened(monkeypatch, resume=True).start_round == 1


def test_a_run_goes_on_with_more_rounds_and_another_quorum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish_round(opened(monkeypatch), 0)
    job = opened(monkeypatch, resume=True, rounds=9, min_sites=2, straggler_wait=5)
    assert (job.start_round, job.quorum, job.federation.rounds) == (1, 2, 9)


def test_fewer_rounds_than_are_finished_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(monkeypatch)
    for index in (0, 1):
        finish_round(job, index)
    with pytest.raises(SettingsError, match="2 rounds are finished, but setting rounds is 1"):
        opened(monkeypatch, resume=True, rounds=1)


def test_the_bytes_of_refused_sites_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(monkeypatch)
    job.begin_round(0)
    job.ledger.add(0, "B", "up", 123)  # its update came, and did not count
    job.ledger.add(0, "C", "down", 45)  # it never answered
    job.refused.append(Refusal("B", 0, "", "why not"))
    save_round(job, 0)
    (line,) = job.folder.rounds()
    assert line["bytes"] == {"B": {"up": 123, "down": 0}, "C": {"up": 0, "down": 45}}
    assert [one["site"] for one in line["refused"]] == ["B"]
    again = opened(monkeypatch, resume=True)
    assert [again.ledger.site_bytes(site, "up") for site in SITES] == [0, 123, 0]
    assert [again.ledger.site_bytes(site, "down") for site in SITES] == [0, 0, 45]


def test_a_line_of_a_round_that_a_kill_broke_off_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(monkeypatch)
    finish_round(job, 0)
    first = job.folder.adapter_path("adapter_last").read_bytes()
    state = (job.folder.path / "server_1.safetensors").read_bytes()
    finish_round(job, 1)
    # Killed after line and state of round 1, before its adapter.
    job.folder.adapter_path("adapter_last").write_bytes(first)
    (job.folder.path / "server_1.safetensors").write_bytes(state)
    again = opened(monkeypatch, resume=True)
    assert again.start_round == 1
    assert [line["round"] for line in again.folder.rounds()] == [0]
    assert again.ledger.total("up") == 100
    finish_round(again, 1)
    assert [path.name for path in again.folder.path.glob("server_*")] == ["server_2.safetensors"]


def test_a_run_that_was_killed_in_its_first_round_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = opened(monkeypatch, download=list(DOWNLOAD))
    again = opened(monkeypatch, resume=True, download=list(DOWNLOAD))
    assert again.run == job.run
    assert again.start_round == 0
    for one in (job, again):
        one.begin_round(0)
    assert again.downlink.message("A") == job.downlink.message("A")


@pytest.mark.parametrize("damage", ["missing", "cut off", "of another kind"])
def test_a_damaged_state_is_named(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    job = opened(monkeypatch)
    finish_round(job, 0)
    path = job.folder.path / "server_1.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:9])
    else:
        path.write_bytes(job.folder.adapter_path("adapter_last").read_bytes())
    with pytest.raises(UpdateError, match=r"server_1\.safetensors.*start a new run"):
        opened(monkeypatch, resume=True)


def test_an_adapters_file_holds_its_fixed_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(monkeypatch, rule="ffa")
    assert job.fixed
    assert all(name.endswith(".lora_a") for name in job.fixed)
    finish_round(job, 0)
    saved = job.folder.load("adapter_last", job.spec)
    assert same(saved.frozen, job.fixed)
    assert not set(saved.tensors) & set(job.fixed)
    again = opened(monkeypatch, resume=True, rule="ffa")
    assert same(again.state.tensors, job.state.tensors)
    assert again.state.offset == {}


def test_the_sites_of_a_round_are_drawn_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(monkeypatch, sites_per_round=2, min_sites=1)
    assert job.quorum == 1
    drawn = []
    for index in range(4):
        finish_round(job, index)
        drawn.append(job.folder.rounds()[-1]["taking_part"])
    assert all(len(set(sites)) == 2 and set(sites) <= set(SITES) for sites in drawn)
    assert len({tuple(sites) for sites in drawn}) > 1
    again = opened(monkeypatch, resume=True, sites_per_round=2, min_sites=1)
    again.begin_round(1)
    assert list(again.taking_part) == drawn[1]


NONSENSE = {
    "setting rule: 'avg' is not known": {"rule": "avg"},
    "setting upload: unknown stage 'zip'": {"upload": ["zip"]},
    "setting download: feedback": {"download": ["difference", "feedback", "int8"]},
    "setting dp_noise without dp_clip": {"dp_noise": 1.0},
    "setting optimizer: scaffold with dp_clip": {"optimizer": "scaffold", "dp_clip": 1.0},
    "setting sites_per_round below min_sites": {"sites_per_round": 1, "min_sites": 2},
    "setting encryption: he does not go with rule: svd": {"encryption": "he"},
    "setting min_sites: 4 is more than the 3 sites": {"min_sites": 4},
    "setting sites_per_round: 4 is more than the 3 sites": {"sites_per_round": 4},
}


@pytest.mark.parametrize("said", NONSENSE)
def test_nonsense_is_refused_before_a_run_has_a_folder(
    monkeypatch: pytest.MonkeyPatch, home: Path, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        opened(monkeypatch, **NONSENSE[said])
    assert not (home / "runs").exists()


def test_the_servers_log_says_why_a_job_does_not_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    panics: list[str] = []
    controller = FlapController(run_name="test", federation={**SETTINGS.to_dict(), "rule": "avg"})
    clients = [SimpleNamespace(name=name) for name in SITES]
    controller._engine = SimpleNamespace(get_clients=lambda: clients)
    monkeypatch.setattr(controller, "system_panic", lambda text, context: panics.append(text))
    with caplog.at_level(logging.ERROR):
        controller.start_controller(FLContext())
        controller.control_flow(SimpleNamespace(triggered=False), FLContext())
    assert len(panics) == 1
    assert panics[0].startswith("SettingsError: setting rule: 'avg' is not known")


def test_run_json_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(monkeypatch, upload=list(UPLOAD))
    finish_round(job, 0)
    job.write_description()
    values = json.loads((job.folder.path / "run.json").read_text())
    assert values["federation"]["upload"] == list(UPLOAD)
    assert values["rounds_finished"] == 1
    assert values["bytes"] == {"up": 100, "down": 200}
    assert not values["finished"]
    assert values["validation_dice_last"] == {}
    full = count("vit_t", job.federation.image_size, job.federation.classes, job.federation.rank)[0]
    assert (full.method, full.parameters) == ("full", values["full_parameters"])


def test_run_json_has_the_last_adapters_validation_dice(monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(monkeypatch)
    dice = {"kidney": 0.5, "mean": 0.5}
    job.write_description(
        {"B": {"last": {"validation": {"dice": dice}}}, "A": {"last": {}}, "C": {}}
    )
    values = json.loads((job.folder.path / "run.json").read_text())
    assert values["finished"]
    assert values["validation_dice_last"] == {"B": dice}


def test_what_an_evaluation_found_is_not_handed_out_with_the_run(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    own = {"adapter_best.safetensors", "run.json", "sites/A.safetensors"}
    evaluation = {
        "evaluation.json",
        "evaluation.csv",
        "evaluation_summary.csv",
        "pictures/A_case_00000_1.png",
        "baselines/local_A/scores.json",
    }
    for name in own | evaluation:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    RunFolder(run).publish(out)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == own
