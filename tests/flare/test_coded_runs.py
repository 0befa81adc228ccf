"""Whole runs with coded and private messages, and what they weigh on the wire."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flap_nvflare.adapter.privacy import epsilon
from flap_nvflare.adapter.update import load_update
from flap_nvflare.aggregation.sampling import sampled_sites
from flap_nvflare.settings import Federation

CODED = {
    "upload": ["difference", "feedback", "top_k=0.1", "int4", "deflate"],
    "download": ["difference", "top_k=0.1", "int4", "deflate"],
    "gauge": "aligned",
    "sites_per_round": 1,
}
SMALL = {"rounds": 3, "image_size": 32, "local_epochs": 1, "cross_site": "global"}
PRIVATE = {"dp_clip": 0.5, "dp_noise": 0.5}
SEED = 9


def test_the_seed_draws_one_site_twice_and_then_the_other() -> None:
    federation = Federation(**SMALL, **CODED, seed=SEED)
    drawn = [sampled_sites(federation, index, ("A", "B")) for index in range(3)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_coded_private_messages_of_drawn_sites(simulation: Callable) -> None:
    coded = simulation("coded", changes={**SMALL, **CODED, **PRIVATE, "seed": SEED})
    run = coded.run()
    lines = coded.lines(run)
    assert [line["round"] for line in lines] == [0, 1, 2], coded.output()[-4000:]
    _, spec, _ = load_update(run / "adapter_last.safetensors")
    first = lines[0]["taking_part"]
    for line in lines:
        (site,) = line["taking_part"]
        assert list(line["sites"]) == [site]
        assert line["refused"] == []
        figures = line["sites"][site]
        assert figures["bytes_up"] == line["bytes"][site]["up"]
        assert 0 < figures["bytes_up"] < spec.bytes / 20
        if line["taking_part"] == first:
            assert 0 < figures["bytes_down"] < spec.bytes / 20
        else:  # it missed two rounds, and gets the adapter whole
            assert spec.bytes / 2 < figures["bytes_down"] < spec.bytes * 1.05
        # A site counts its own messages.
        privacy = figures["privacy"]
        assert privacy["releases"] == (line["round"] + 1 if [site] == first else 1)
        assert privacy["epsilon_replace"] == pytest.approx(
            epsilon(PRIVATE["dp_noise"], privacy["releases"], privacy["delta"]), rel=1e-9
        )
    print([line["bytes"] for line in lines], spec.bytes)
