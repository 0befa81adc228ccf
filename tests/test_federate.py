"""Federations of two or three sites in one process, on scans of a few slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from scan_files import write_sites

from flap_nvflare.adapter.factors import LORA_A, LORA_B
from flap_nvflare.aggregation import RULES
from flap_nvflare.aggregation.sampling import sampled_sites
from flap_nvflare.bundle.builders import first_adapter
from flap_nvflare.bundle.workflow import build_work
from flap_nvflare.in_process import Curve, Federated, federate, run, show_adapter
from flap_nvflare.settings import Federation, SettingsError, Site
from flap_nvflare.training.site_round import SiteRound

SITES = ("A", "B", "C")
SMALL = Federation(
    base="random",
    image_size=32,
    rank=2,
    rounds=1,
    local_epochs=1,
    batch_size=16,
    augment=False,
    lora_blocks=1,
    hostile=0,
)
Tensors = Mapping[str, torch.Tensor]
Make = Callable[..., dict[str, SiteRound]]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    write_sites(root / "scans", SITES, (3, 4, 3))
    return root


@pytest.fixture
def make(disk: Path, tmp_path: Path) -> Make:
    """Makes the rounds of some sites; scans are prepared once for the whole file."""

    def made(federation: Federation, names: tuple[str, ...] = ("A", "B")) -> dict[str, SiteRound]:
        found = {}
        for name in names:
            site = Site(name, disk / "scans", state_dir=disk / "cache")
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            found[name] = SiteRound(build_work(federation, site), folder)
        return found

    return made


def changed(**settings: Any) -> Federation:
    return dataclasses.replace(SMALL, **settings)


def same(first: Tensors, second: Tensors) -> bool:
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


def away(done: Federated, start: Tensors) -> float:
    """Length of the federation's step, all tensors as one vector."""
    moved = [(done.state.tensors[n] - start[n]).double().square().sum() for n in start]
    return float(torch.stack(moved).sum().sqrt())


def start_of(sites: Mapping[str, SiteRound], federation: Federation) -> Tensors:
    return first_adapter(federation, next(iter(sites.values())).work.site)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_round_of_every_rule(rule: str, make: Make) -> None:
    federation = changed(rule=rule)
    sites = make(federation)
    start = start_of(sites, federation)
    done = federate(sites, federation)
    assert list(done.state.tensors) == sorted(start)
    assert all(done.state.tensors[n].shape == start[n].shape for n in start)
    assert all(bool(tensor.isfinite().all()) for tensor in done.state.tensors.values())
    assert away(done, start) > 0
    (line,) = done.rounds
    assert (line["round"], line["messages"]) == (0, 2)
    assert 0 < line["up"] <= line["down"]
    assert 0 <= line["error"] < 1
    for site in sites.values():
        show_adapter(site, done.state.parcel())
        assert site.evaluate("test").to_dict()["cases"]


def test_the_seed_decides_and_the_order_of_the_sites_does_not(make: Make) -> None:
    first, turned = federate(make(SMALL), SMALL), make(SMALL)
    again = federate({name: turned[name] for name in ("B", "A")}, SMALL)
    assert same(first.state.tensors, again.state.tensors)
    other = changed(seed=1)
    assert not same(first.state.tensors, federate(make(other), other).state.tensors)


def test_only_the_sites_that_are_drawn_take_part(make: Make) -> None:
    federation = changed(rounds=3, sites_per_round=1)
    told: list[str] = []
    done = federate(make(federation, SITES), federation, progress=told.append)
    asked = [name for index in range(3) for name in sampled_sites(federation, index, SITES)]
    assert [text.split()[3] for text in told] == asked
    assert [line["messages"] for line in done.rounds] == [1, 1, 1]


def test_a_clipped_update_moves_no_further_than_the_clip(make: Make) -> None:
    free, clipped = changed(rule="mean"), changed(rule="mean", dp_clip=0.01)
    start = start_of(make(free), free)
    assert away(federate(make(free), free), start) > 0.011
    assert away(federate(make(clipped), clipped), start) == pytest.approx(0.01, rel=0.1)


def test_noise_comes_from_the_seed_here(make: Make) -> None:
    federation = changed(rule="mean", dp_clip=0.01, dp_noise=5.0)
    first, again = (federate(make(federation), federation) for _ in range(2))
    start = start_of(make(federation), federation)
    numbers = sum(tensor.numel() for tensor in start.values())
    assert same(first.state.tensors, again.state.tensors)
    # The mean of two equal weights' noise of 5 * 0.01 a number.
    assert away(first, start) == pytest.approx(0.05 * (numbers / 2) ** 0.5, rel=0.05)


def test_a_hostile_site_moves_the_mean_and_not_the_median(make: Make) -> None:
    far = {}
    for rule in ("mean", "median"):
        federation = changed(rule=rule, hostile=1, weight_by="equal")
        sites = make(federation, SITES)
        start = start_of(sites, federation)
        honest = federate(sites, federation)
        hostile = federate(make(federation, SITES), federation, attacks={"B": "scale"})
        far[rule] = away(hostile, start) / away(honest, start)
    assert far["mean"] > 10
    assert far["median"] < 3


def test_coded_ways_carry_fewer_bytes_and_lose_little(make: Make) -> None:
    plain = changed(rule="mean", rounds=2)
    coded = changed(
        rule="mean",
        rounds=2,
        upload=("difference", "feedback", "int8", "deflate"),
        download=("difference", "int8", "deflate"),
    )
    first, second = (federate(make(one), one) for one in (plain, coded))
    start = start_of(make(plain), plain)
    for line, shorter in zip(first.rounds, second.rounds, strict=True):
        assert shorter["up"] < 0.4 * line["up"]
        assert shorter["down"] < 0.4 * line["down"]
    moved = [
        (second.state.tensors[n] - first.state.tensors[n]).double().square().sum() for n in start
    ]
    assert 0 < float(torch.stack(moved).sum().sqrt()) < 0.2 * away(first, start)


def test_a_site_that_was_away_costs_a_whole_adapter(make: Make) -> None:
    federation = changed(
        rule="mean", rounds=3, sites_per_round=1, download=("difference", "top_k=0.05", "int4")
    )
    done = federate(make(federation), federation)
    asked = [sampled_sites(federation, index, ("A", "B"))[0] for index in range(3)]
    whole = sum(tensor.nbytes for tensor in done.state.tensors.values())
    for index in (1, 2):
        stayed = asked[index] == asked[index - 1]
        assert (done.rounds[index]["down"] < 0.3 * whole) == stayed
    assert done.rounds[0]["down"] < 0.3 * whole


def test_factors_that_train_by_turns_move_by_turns(make: Make) -> None:
    federation = changed(rule="alternate", rounds=2)
    sites = make(federation)
    start = start_of(sites, federation)
    one = changed(rule="alternate", rounds=1)
    after = federate(make(federation), one).state.tensors
    done = federate(sites, federation)
    for name in start:
        if name.endswith(LORA_A):
            assert torch.equal(after[name], start[name])
            assert not torch.equal(done.state.tensors[name], start[name])
        elif name.endswith(LORA_B):
            assert torch.equal(done.state.tensors[name], after[name])
    for line, rests in zip(done.rounds, (LORA_A, LORA_B), strict=True):
        travels = sum(t.nbytes for name, t in start.items() if not name.endswith(rests))
        assert line["up"] == 2 * travels < line["down"]


def test_the_curve_scores_each_round_and_changes_no_byte(make: Make) -> None:
    federation = changed(rounds=2)
    plain = federate(make(federation), federation)
    sites = make(federation)
    curve = Curve(sites, show_adapter)
    watched = federate(sites, federation, curve=curve)
    assert same(plain.state.tensors, watched.state.tensors)
    assert [point["round"] for point in curve.history(federation)] == [0, 1]


def test_settings_that_make_no_sense_together_are_refused_before_the_scans(tmp_path: Path) -> None:
    wrong = changed(dp_noise=1.0)
    with pytest.raises(SettingsError, match="dp_noise without dp_clip"):
        run("federated", wrong, tmp_path / "none", ("A",))
