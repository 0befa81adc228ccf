"""Settings: every bad value is refused by name, and the job's file gives the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from flap_nvflare.settings import Federation, SettingsError, Site

JOB = Path(__file__).parents[1] / "jobs" / "fed_kits" / "app" / "config" / "federation.yaml"


def test_survives_a_round_trip() -> None:
    federation = Federation(rank=4, class_names=("prostate",))
    assert Federation.from_dict(federation.to_dict()) == federation


def test_files_from_before_a_setting_say_its_default() -> None:
    old = Federation(rank=4).to_dict()
    del old["grey_values"]
    assert Federation.from_dict(old) == Federation(rank=4, grey_values="site")
    assert Federation.whole(old) == Federation(rank=4).to_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("rank", "8"),
        ("rank", True),
        ("rank", 8.0),
        ("method", "everything"),
        ("rule", "two words"),
        ("learning_rate", float("nan")),
        ("learning_rate", -1.0),
        ("class_names", []),
        ("class_names", "kidney"),
        ("rounds", 10**9),
        ("loss_weighting", "inverse"),
        ("grey_values", "mr"),
        ("augment_views", -1),
        ("no_such_setting", 1),
    ],
)
def test_a_bad_value_is_named(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=name):
        Federation.from_dict({name: value})


@pytest.mark.parametrize("processes", [0, -1, 2.0, "2", True, None, 10**6])
def test_a_sites_processes_are_a_count(processes: object) -> None:
    with pytest.raises(SettingsError, match=r"setting processes: .* a whole number from 1"):
        Site("A", Path(), processes=processes)  # type: ignore[arg-type]


def test_several_processes_share_no_numbered_gpu() -> None:
    assert Site("A", Path(), device="cuda:1").processes == 1
    assert Site("A", Path(), device="cuda", processes=2).processes == 2
    with pytest.raises(SettingsError, match="setting device: 'cuda:1' is not allowed"):
        Site("A", Path(), device="cuda:1", processes=2)


def test_job_file_holds_the_defaults() -> None:
    assert Federation.load(JOB, environment={}) == Federation()


def test_a_real_checkpoint_switches_to_the_papers_settings() -> None:
    federation = Federation.load(JOB, environment={"FLAP_SAM_CHECKPOINT": "sam_vit_b.pth"})
    found = (federation.arch, federation.image_size, federation.rank, federation.rounds)
    assert found == ("vit_b", 224, 32, 25)


@pytest.mark.parametrize("text", ["- a", "rank: [", "profile: hospital", "rank: many"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"federation\.yaml"):
        Federation.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="absent"):
        Federation.load(tmp_path / "absent.yaml")


def test_yamls_short_numbers_are_numbers() -> None:
    assert Federation.from_dict({"learning_rate": "8e-4"}).learning_rate == 8e-4
    with pytest.raises(SettingsError, match="learning_rate"):
        Federation.from_dict({"learning_rate": "fast"})


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_slices_that_are_never_drawn_cannot_be_weighted(fraction: float) -> None:
    Federation(foreground_fraction=fraction)
    with pytest.raises(SettingsError, match="foreground_fraction"):
        Federation(foreground_fraction=fraction, loss_weighting="importance")


@pytest.mark.parametrize(("name", "value"), [("cache_gb", -1.0), ("workers", -1)])
def test_a_sites_bad_number_is_named(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=name):
        Site("A", Path("scans"), **{name: value})


def test_a_rounds_own_process_is_a_switch() -> None:
    assert Site("A", Path("scans")).own_process == "auto"
    with pytest.raises(SettingsError, match="own_process: 'perhaps'"):
        Site("A", Path("scans"), own_process="perhaps")
