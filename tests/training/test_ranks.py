"""One process needs no agreement; a process of several finds its device or says why not."""

from __future__ import annotations

import pytest
import torch

from flap_nvflare.settings import SettingsError
from flap_nvflare.training.ranks import ONE_PROCESS, join_ranks, rank_device


def test_one_process_decides_by_itself() -> None:
    assert ONE_PROCESS.first
    assert ONE_PROCESS.any(True)
    assert not ONE_PROCESS.any(False)
    assert ONE_PROCESS.total(0.1) == 0.1
    ONE_PROCESS.leave()


def test_without_torchrun_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match=r"LOCAL_RANK is not set: start .* by torchrun"):
        rank_device("cpu")
    with pytest.raises(SettingsError, match=r"RANK is not set: start .* by torchrun"):
        join_ranks(torch.device("cpu"))


def test_each_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_device("auto") == rank_device("cuda") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)] * 2
    assert rank_device("cpu") == torch.device("cpu")
    with pytest.raises(SettingsError, match="device: 'cuda:0' is one GPU"):
        rank_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SettingsError, match="process 2 finds no GPU of its own: 2 are visible"):
        rank_device("cuda")
