"""The filter of differential privacy: what leaves a site, what it counts, what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvflare.apis.filter import ContentBlockedException
from test_coding import same, trained
from torch import Tensor
from wire import CODED, Tensors, Wire, weights

from flap_nvflare.adapter.privacy import epsilon
from flap_nvflare.flare.coding import EncodeUpdate, PrivacyFilter

HEAD = "mask_decoder.mask_tokens.weight"


def moved(one: Tensors, other: Tensors) -> float:
    squares: Tensor = sum((one[n].double() - other[n].double()).square().sum() for n in one)
    return float(squares) ** 0.5


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
def test_what_leaves_is_clipped_and_the_server_learns_the_figures(
    coded: bool, tmp_path: Path
) -> None:
    wire = Wire(tmp_path, dp_clip=0.5, dp_noise=2.0, **(CODED if coded else {}))
    for number in (1, 2):
        task = wire.received("A")
        update = trained(weights(task), number)
        sent = wire.answer("A", update, task)
        if not coded:
            start, released = weights(task), weights(sent)
            size = sum(t.numel() for t in start.values()) ** 0.5
            assert moved(released, start) == pytest.approx(2.0 * 0.5 * size, rel=0.1)
        privacy = wire.job.reports["A"]["privacy"]
        assert privacy == {
            "clip": 0.5,
            "noise": 2.0,
            "releases": number,
            "delta": wire.federation.dp_delta,
            "epsilon_replace": pytest.approx(epsilon(2.0, number, wire.federation.dp_delta)),
            "epsilon_zero_out": pytest.approx(
                epsilon(2.0, number, wire.federation.dp_delta, "zero_out")
            ),
            "secret": True,
        }
        line = wire.job.round_line(wire.round_index)
        assert line["sites"]["A"]["privacy"] == privacy
        count = json.loads((tmp_path / "A" / "releases_A.json").read_text())
        assert count == {"2.0": number}
        wire.next_round()


@pytest.mark.parametrize(
    ("asked", "floor"),
    [
        ({"dp_clip": 0.0}, {"clip": 0.5}),
        ({"dp_clip": 1e6, "dp_noise": 2.0}, {"clip": 0.5, "noise": 2.0}),
        ({"dp_clip": 0.5, "dp_noise": 1e-9}, {"clip": 0.5, "noise": 2.0}),
    ],
)
def test_a_server_can_not_ask_for_less_than_the_site_gives(
    asked: dict[str, float], floor: dict[str, float], tmp_path: Path
) -> None:
    wire = Wire(tmp_path, **asked)
    task = wire.received("A")
    reply = wire.reply("A", task, trained(weights(task), 1))
    with pytest.raises(ContentBlockedException, match="this site sends with at most"):
        PrivacyFilter(**floor).process(reply, wire.site_contexts["A"])
    # The job's own settings at the site are as good as the filter's arguments.
    config = wire.site_contexts["A"].config
    config.mkdir()
    lines = f"dp_clip: {floor['clip']}\ndp_noise: {floor.get('noise', 0.0)}\n"
    (config / "federation.yaml").write_text(lines, encoding="utf-8")
    with pytest.raises(ContentBlockedException, match="this site sends with at most"):
        PrivacyFilter().process(reply, wire.site_contexts["A"])


def test_without_its_filter_nothing_private_leaves(tmp_path: Path) -> None:
    wire = Wire(tmp_path, dp_clip=0.5)
    task = wire.received("A")
    reply = wire.reply("A", task, trained(weights(task), 1))
    with pytest.raises(ContentBlockedException, match="no PrivacyFilter"):
        EncodeUpdate().process(reply, wire.site_contexts["A"])


def test_clipping_alone_cuts_to_the_norm_and_promises_nothing(tmp_path: Path) -> None:
    wire = Wire(tmp_path, dp_clip=0.5)
    task = wire.received("A")
    start = weights(task)
    update = trained(start, 1)
    assert moved(update, start) > 1
    sent = wire.answer("A", update, task)
    assert moved(weights(sent), start) == pytest.approx(0.5, rel=1e-3)
    privacy = wire.job.reports["A"]["privacy"]
    assert privacy["epsilon_replace"] is None
    assert privacy["epsilon_zero_out"] is None
    # A change within the norm leaves as it is.
    small = trained(start, 2, size=1e-5)
    again = PrivacyFilter().process(wire.reply("A", task, small), wire.site_contexts["A"])
    assert same(weights(again), small)


def test_noise_is_drawn_afresh_for_every_message(tmp_path: Path) -> None:
    wire = Wire(tmp_path, dp_clip=0.5, dp_noise=1.0)
    task = wire.received("A")
    update = trained(weights(task), 1)
    one, other = (
        PrivacyFilter().process(wire.reply("A", task, update), wire.site_contexts["A"])
        for _ in range(2)
    )
    assert moved(weights(one), weights(other)) > 1


def test_control_variates_do_not_leave_where_privacy_is_asked_for(tmp_path: Path) -> None:
    wire = Wire(tmp_path, dp_clip=0.5, dp_noise=1.0)
    task = wire.received("A")
    control = {HEAD: torch.ones(2)}
    reply = wire.reply("A", task, trained(weights(task), 1), control)
    with pytest.raises(ContentBlockedException, match="without noise"):
        wire.sent_up("A", reply)
    assert not (tmp_path / "A" / "releases_A.json").exists()


def test_a_count_of_messages_that_can_not_be_read_lets_none_leave(tmp_path: Path) -> None:
    wire = Wire(tmp_path, dp_clip=0.5, dp_noise=1.0)
    task = wire.received("A")
    (tmp_path / "A" / "releases_A.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="no count of messages"):
        wire.sent_up("A", wire.reply("A", task, trained(weights(task), 1)))


def test_a_message_whose_start_is_not_known_does_not_leave(tmp_path: Path) -> None:
    wire = Wire(tmp_path, dp_clip=0.5)
    task = wire.received("A")
    (wire.state("A") / "held_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"held_0\.safetensors"):
        wire.sent_up("A", wire.reply("A", task, trained(weights(task), 1)))
