"""A round under differential privacy: what is sent, what is counted, what the server believes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flap_nvflare.adapter.privacy import epsilon
from flap_nvflare.flare.privacy import SEED_VARIABLE, mechanism, read_statement, release
from flap_nvflare.flare.reports import read_report
from flap_nvflare.settings import Federation, SettingsError, Site

START = {"x": torch.zeros(4)}
TRAINED = {"x": torch.tensor([0.0, 3.0, 0.0, 4.0])}


def released(
    folder: Path | None, round_index: int = 0, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    site = Site("A", Path("scans"), state_dir=folder)
    return release(Federation(**settings), site, round_index, START, TRAINED)


@pytest.fixture(autouse=True)
def without_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SEED_VARIABLE, raising=False)


def test_without_differential_privacy_nothing_changes_and_nothing_is_counted(
    tmp_path: Path,
) -> None:
    tensors, said = released(tmp_path)
    assert torch.equal(tensors["x"], TRAINED["x"])
    assert said == {}
    assert not list(tmp_path.iterdir())


def test_clipped_blurred_and_counted_over_jobs(tmp_path: Path) -> None:
    for job in range(3):
        tensors, said = released(tmp_path, dp_clip=1.0, dp_noise=2.0)
        assert not torch.equal(tensors["x"], TRAINED["x"])
        assert said["releases"] == job + 1
        assert said["epsilon_replace"] == epsilon(2.0, job + 1, 1e-5)
    assert json.loads((tmp_path / "releases_A.json").read_text()) == {"2.0": 3}


def test_clipping_alone_is_said_to_protect_nothing(tmp_path: Path) -> None:
    tensors, said = released(tmp_path, dp_clip=1.0, round_index=0)
    torch.testing.assert_close(tensors["x"], TRAINED["x"] / 5)
    assert said["secret"] is False
    assert said["epsilon_replace"] is None
    # What was sent in the clear can't be taken back by noise later.
    assert released(tmp_path, dp_clip=1.0, dp_noise=9.0, round_index=1)[1]["secret"] is False


def test_a_sites_seed_repeats_the_noise_and_is_said_to_protect_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SEED_VARIABLE, "7")
    wanted = {"dp_clip": 1.0, "dp_noise": 2.0}
    draws = [released(tmp_path, index, **wanted)[0]["x"] for index in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert released(tmp_path, 2, **wanted)[1]["secret"] is False
    federation = Federation(**wanted)
    assert mechanism(federation, "A", 0) != mechanism(federation, "B", 0)
    monkeypatch.setenv(SEED_VARIABLE, "secret")
    with pytest.raises(SettingsError, match="'secret' is no whole number"):
        released(tmp_path, dp_clip=1.0, dp_noise=2.0)


def test_nothing_is_sent_that_is_not_bounded_or_not_counted(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"dp_noise: 1\.0 needs a dp_clip"):
        released(tmp_path, dp_noise=1.0, round_index=0)
    with pytest.raises(SettingsError, match="no state_dir"):
        released(None, dp_clip=1.0, dp_noise=1.0, round_index=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        released(tmp_path / "file", dp_clip=1.0, dp_noise=1.0, round_index=0)


def test_the_server_keeps_the_statement_and_refuses_what_is_none(tmp_path: Path) -> None:
    _, said = released(tmp_path, dp_clip=1.0, dp_noise=2.0, round_index=0)
    kept = read_report({"privacy": said}, ("kidney",))["privacy"]
    assert kept["epsilon_replace"] == said["epsilon_replace"]
    assert "unit" not in kept  # the server's own words, not a site's
    bad: list[Any] = [
        3,
        {**said, "scan": [1.0]},
        {**said, "clip": -1.0},
        {**said, "noise": math.inf},
        {**said, "epsilon_replace": "small"},
        {**said, "secret": 1},
    ]
    for one in bad:
        with pytest.raises(ValueError, match="privacy"):
            read_statement(one)
