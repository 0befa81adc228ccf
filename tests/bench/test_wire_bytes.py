"""Bytes of coded updates: the order that more coding must give."""

from __future__ import annotations

import json

import pytest

from flap_nvflare.bench import wire


def test_less_is_sent_the_more_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wire, "SIZES", (("vit_t", 64, 4),))
    assert wire.main(["--json"]) == 0
    figures = {one["stages"]: one for one in json.loads(capsys.readouterr().out)}
    plain, int8, int4, sparse = (
        figures[f"difference{stages}"]
        for stages in ("", ", int8, deflate", ", int4, deflate", ", top_k=0.1, int4, deflate")
    )
    assert plain["error"] == 0
    assert 32 <= plain["bits"] < 34
    assert plain["bytes"] > int8["bytes"] > int4["bytes"] > sparse["bytes"]
    assert int8["error"] < int4["error"] < sparse["error"] < 1
    assert sparse["of_full"] == pytest.approx(plain["of_full"] * plain["bytes"] / sparse["bytes"])
    assert wire.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 2 + len(figures)
