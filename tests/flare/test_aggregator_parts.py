"""What the aggregator does with drawn sites, control variates, and sites that a rule leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvflare.apis.shareable import Shareable
from test_aggregator import FROZEN, HEAD, SITES, B, Server, message, tensors

from flap_nvflare.adapter.parcel import Parcel
from flap_nvflare.flare import messages


def test_a_site_that_was_not_drawn_does_not_count(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", quorum=2, sites_per_round=2)
    drawn = list(server.job.taking_part)
    (other, *_) = [site for site in SITES if site not in drawn]
    assert not server.accept(other, message(other))
    assert "not drawn" in server.job.refused[0].reason
    assert all(server.accept(site, message(site)) for site in drawn)
    server.aggregate()
    line = server.job.round_line(1)
    assert line["taking_part"] == sorted(line["sites"]) == drawn
    assert [one["site"] for one in line["refused"]] == [other]
    # Its bytes are booked, though it does not count.
    assert set(line["bytes"]) == {*drawn, other}
    assert line["bytes"][other]["up"] == messages.serialised_bytes(message(other))


CONTROLS: dict[str, tuple[Callable[[dict], object], str]] = {
    "one missing": (lambda data: data.pop(f"control/{HEAD}"), HEAD),
    "of another shape": (lambda data: data.update({f"control/{B}": torch.zeros(5, 3)}), B),
    "not finite": (lambda data: data[f"control/{HEAD}"].fill_(math.inf), HEAD),
    "of another tensor": (lambda data: data.update({f"control/{FROZEN}": torch.ones(1)}), FROZEN),
}


def controlled(site: str, change: Callable[[dict], object]) -> Shareable:
    """An update with a change of every control variate."""

    def added(data: dict) -> None:
        data.update(Parcel({}, {}, tensors(ord(site) + 100)).flat())
        change(data)

    return message(site, added)


@pytest.mark.parametrize("fault", CONTROLS)
def test_a_false_control_variate_does_not_count(fault: str, tmp_path: Path) -> None:
    change, key = CONTROLS[fault]
    server = Server(tmp_path / "run", quorum=1, optimizer="scaffold")
    assert not server.accept("F", controlled("F", change))
    assert (server.job.refused[0].site, server.job.refused[0].key) == ("F", key)
    assert server.accept("A", controlled("A", lambda data: None))
    server.aggregate()
    control = server.job.state.control
    assert control.keys() == tensors(0).keys()
    # One of six sites has changed its own: the federation's changes by a sixth of that.
    expected = tensors(ord("A") + 100)
    assert all(torch.allclose(control[name], expected[name] / 6) for name in control)


def test_the_sites_left_out_by_the_rule_are_named_in_the_rounds_line(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", rule="krum")
    assert all(server.accept(site, message(site)) for site in "ABCD")
    assert server.accept("E", message("E", lambda data: data[B].mul_(100)))
    server.aggregate()
    assert server.job.round_line(1)["excluded"] == ["E"]


def test_an_update_without_control_variates_does_not_count_with_scaffold(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", optimizer="scaffold")
    assert not server.accept("F", message("F"))
    assert "missing" in server.job.refused[0].reason
