from __future__ import annotations

import json

import pytest
import torch
from aggregation_cases import exact_products

from flap_nvflare.bench import aggregation as bench

_SMALL = ["--layers", "2", "--side", "24", "--sites", "3", "--rank", "4", "--repeats", "1"]


def test_json_holds_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*_SMALL, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"] == figures["dense_seconds"] / figures["qr_seconds"]
    assert figures["difference"] < 1e-5
    assert 0 < figures["svd_error"] <= figures["mean_error"] < 1
    assert (figures["layers"], figures["side"], figures["sites"]) == (2, 24, 3)


def test_text_names_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(_SMALL) == 0
    text = capsys.readouterr().out
    assert "QR and small SVD" in text
    assert "dense SVD" in text
    assert "2 adapters of 24 x 24, rank 4, 3 sites" in text


def test_the_dense_way_is_the_cut_of_the_mean_product() -> None:
    contributions = bench.drifted(1, 6, 3, 2)
    u, s, vh = torch.linalg.svd(exact_products(contributions)["layer.00"])
    expected = (u[:, :2] * s[:2]) @ vh[:2]
    torch.testing.assert_close(bench.dense_products(contributions)["layer.00"], expected)
