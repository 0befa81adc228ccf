"""The job with `encryption: he` in FLARE's simulator: sealed artifacts, the same adapter."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from encryption_cases import SMALL
from safetensors import safe_open

from flap_nvflare.adapter.cipher import SEALED, Cipher
from flap_nvflare.adapter.update import load_update


@pytest.mark.slow
def test_the_encrypted_job_ends_in_the_same_adapter_which_the_server_never_has(
    simulation: Callable,
) -> None:
    clear = simulation("clear", changes=SMALL)
    expected, plain, _ = load_update(clear.run() / "adapter_last.safetensors")

    hidden = simulation("hidden", changes={**SMALL, "encryption": "he"})
    run = hidden.run()
    output = hidden.output()
    assert "Test Dice of the best adapter" in output, output[-4000:]
    files = ["adapter_best.safetensors", "adapter_last.safetensors"]
    found = sorted(path.name for path in run.rglob("*.safetensors"))
    assert found == [*files, "server_2.safetensors"]
    with safe_open(str(run / found[-1]), framework="pt") as state:
        assert not list(state.keys())  # a linear rule remembers nothing
    keys = hidden.home / "simulated_keys"
    site = Cipher((keys / "client_context.tenseal").read_bytes())
    assert not Cipher((keys / "server_context.tenseal").read_bytes()).opens
    for name in files:
        sealed, spec, _ = load_update(run / name)
        assert set(sealed) == SEALED
        assert spec == site.spec(plain)
    sealed, _, extra = load_update(run / "adapter_last.safetensors")
    assert extra["rounds"] == "2"
    opened = site.open(sealed, plain)
    for name, tensor in expected.items():
        torch.testing.assert_close(opened[name], tensor, rtol=1e-3, atol=1e-4)

    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [set(line["sites"]) for line in rounds] == [{"A", "B"}] * 2
    assert all(not line["refused"] and line["aggregation_error"] is None for line in rounds)
    up = rounds[1]["sites"]["A"]["bytes_up"]
    assert 1 <= up / site.spec(plain).bytes < 1.01
    matrix = json.loads((run / "cross_site.json").read_text())
    assert set(matrix) == {"last", "best"}
    assert all(set(row) == {"A", "B"} for row in matrix.values())
