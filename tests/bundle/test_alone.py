from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_nvflare.bundle.alone import Alone
from flap_nvflare.bundle.builders import make_federation, make_site
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.settings import Federation, SettingsError, Site


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bytes(
    federation: Federation, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Alone(build_work(federation, site), tmp_path / "whole").train()

    killed = build_work(federation, site)
    train = killed.train

    def train_once(index: int, progress: object = None) -> object:
        if index == 1:
            raise Killed
        return train(index)

    monkeypatch.setattr(killed, "train", train_once)
    with pytest.raises(Killed):
        Alone(killed, tmp_path / "cut").train()
    with pytest.raises(SettingsError, match="holds a run already"):
        Alone(build_work(federation, site), tmp_path / "cut").train()
    Alone(build_work(federation, site), tmp_path / "cut").train(resume=True)

    for name in ("adapter_last.safetensors", "adapter_best.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "rounds.jsonl").open()]
        for run in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_an_adapter_of_another_rank_is_refused(
    federation: Federation, site: Site, tmp_path: Path
) -> None:
    from flap_nvflare.adapter.update import save_update

    other = build_work(Federation.from_dict({**federation.to_dict(), "rank": 3}), site)
    save_update(tmp_path / "other.safetensors", other.adapter(), other.spec())
    alone = Alone(build_work(federation, site), tmp_path)
    with pytest.raises(SettingsError, match="was made with rank 3, this run has 2"):
        alone.evaluate(tmp_path / "other.safetensors", "test")


def test_builders_take_what_is_missing_from_profile_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert make_federation("paper", rounds=None, rank=4).rounds == 25
    assert make_federation("paper", rounds=None, rank=4).rank == 4
    monkeypatch.setenv("FLAP_DATA_ROOT", "/scans")
    monkeypatch.setenv("FLAP_SAM_CHECKPOINT", "/sam.pth")
    found = make_site(1, None)
    assert (found.name, found.data_root, found.checkpoint) == ("1", Path("/scans"), "/sam.pth")
    monkeypatch.delenv("FLAP_DATA_ROOT")
    with pytest.raises(SettingsError, match="site A has no data: give --data_root FOLDER"):
        make_site("A", None)
