"""The benchmark on a small network: names, units and what the ratios mean; no time is tested."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flap_nvflare.bench import steps
from flap_nvflare.bench.__main__ import main
from flap_nvflare.bench.rows import GROUPS, Setting
from flap_nvflare.bench.timing import in_turn, peak_bytes, share, speed

CPU = torch.device("cpu")
SMALL = Setting(CPU, bf16=True, repeats=1, batch=1, sizes=(48, 96))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "ARCH", "vit_t")
    monkeypatch.setattr(steps, "RANK", 2)
    monkeypatch.setattr(steps, "LAST_BLOCKS", 2)


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("training", {"train_step_48_fp32", "train_step_96_bf16", "floor_96_bf16"}),
        ("full", {"train_step_96_vs_full"}),
        ("prefix", {"prefix_cache_step", "prefix_cache_step_48"}),
        ("inference", {"inference", "inference_48"}),
    ],
)
def test_a_group_gives_its_rows(group: str, names: set[str]) -> None:
    found = {row.name: row for row in GROUPS[group](SMALL)}
    assert names <= set(found)
    for row in found.values():
        assert row.note
        assert row.reference is not None
        assert row.ratio is not None
        if row.unit == "s":
            assert row.ratio == pytest.approx(row.reference / row.ours)
            assert row.ours > 0


def test_ways_run_in_turn_and_the_first_run_does_not_count() -> None:
    calls: list[str] = []
    found = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU)
    assert calls == ["a", "b"] * 3
    assert all(0 <= seconds < math.inf for seconds in found.values())


def test_a_peak_is_what_was_held_at_once() -> None:
    def hold() -> None:
        for _ in range(3):
            torch.ones(2**24)  # 64 MiB, one after the other

    assert 60e6 < peak_bytes(hold, CPU) < 180e6


@pytest.mark.long
def test_memory_of_vit_b_is_measured_in_processes_of_their_own() -> None:
    found = {row.name: row for row in GROUPS["memory"](Setting(CPU, True, 1, 1, (224,)))}
    assert set(found) == {
        f"train_memory_224{suffix}" for suffix in ("", "_fp32", "_checkpointing", "_full")
    }
    ours, saving = found["train_memory_224"].ratio, found["train_memory_224_checkpointing"].ratio
    assert ours is not None
    assert saving is not None
    assert 0 < saving < ours < 1 < (found["train_memory_224_full"].ratio or 0)


def test_ratios_say_how_much_better() -> None:
    assert speed("step", 1.0, 2.5, "").ratio == 2.5
    assert share("memory", 3.0, 6.0, "MiB", "").ratio == 0.5


def test_the_least_operations_are_below_what_a_step_does() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    step = steps.make_step("straightforward", 96, 2, CPU)
    with FlopCounterMode(display=False) as counter:
        step()
    assert 0.5 * counter.get_total_flops() < steps.least_operations(96, 2)
    assert steps.least_operations(96, 2) < counter.get_total_flops()


def test_rows_are_printed_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "largest_batches", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed] == [
        f"largest_batch_8gb_{size}" for size in (224, 512, 1024)
    ]
    assert all(set(row) >= {"name", "ours", "reference", "ratio", "unit"} for row in printed)
    assert main(["--only", "largest_batches"]) == 0
    assert "largest_batch_8gb_512" in capsys.readouterr().out
