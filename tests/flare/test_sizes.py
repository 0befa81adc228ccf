"""Bytes of a message, counted without a copy of it; and what refusing a large one takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils import fobs

from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.flare import messages, sizes
from flap_nvflare.flare.sizes import _DTYPES, serialised_bytes, size_fault

HERE = Path(__file__).parent
LARGE = 500_000_000


def weights(data: dict[str, Any], **meta: Any) -> Shareable:
    return DXO(DataKind.WEIGHTS, data, meta).to_shareable()


@given(
    tensors=st.lists(
        st.tuples(st.lists(st.integers(0, 40), max_size=3), st.sampled_from(list(_DTYPES))),
        max_size=4,
    ),
    blob=st.binary(max_size=300),
    text=st.text(max_size=300),
    number=st.integers(-(2**63), 2**64 - 1) | st.floats() | st.booleans() | st.none(),
)
@settings(max_examples=150, deadline=None)
def test_the_count_is_that_of_the_message_itself(
    tensors: list[Any], blob: bytes, text: str, number: Any
) -> None:
    data: dict[str, Any] = {
        f"{text}{i}": torch.zeros(shape, dtype=dtype) for i, (shape, dtype) in enumerate(tensors)
    }
    message = weights({**data, messages.CODED: blob}, said=[text, {text: number}], at=(1, "a"))
    assert serialised_bytes(message) == len(fobs.dumps(message))


@pytest.mark.parametrize("size", [255, 256, 65_535, 65_536, 10_485_759, 10_485_760, 10_485_761])
def test_the_count_at_the_edges_of_the_formats(size: int) -> None:
    for whole in (b"1" * size, torch.zeros(size, dtype=torch.uint8)):
        for part in (whole, whole[: size - 80], whole[: size - 72]):
            message = weights({"a": part, "b": torch.ones(2)})
            assert serialised_bytes(message) == len(fobs.dumps(message))


def test_the_count_of_models_to_score() -> None:
    models = {name: messages.weights_dxo({"a": torch.ones(9, 9)}, SPEC, 3) for name in "ab"}
    message = DXO(DataKind.COLLECTION, models).to_shareable()
    assert serialised_bytes(message) == len(fobs.dumps(message))


SPEC = UpdateSpec("flap", 2, "ab" * 32, {"a": (100, 100), "b": (5,)})


def deep(depth: int) -> Any:
    value: Any = torch.ones(1000)
    for _ in range(depth):
        value = [value]
    return value


def endless() -> list[Any]:
    value: list[Any] = [b"1" * 5000]
    value.append(value)
    return value


class Untouchable:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


@pytest.mark.parametrize(
    "value",
    [
        deep(5000), "a" * 5000, {1: {2: "a" * 5000}}, np.ones(1000, np.float32), {"a" * 5000},
        torch.ones(1000).to_sparse(), torch.ones(1000, device="meta"),
        torch.nn.Parameter(torch.ones(1000)), [[1] * 2000] * 3, [Untouchable(), b"1" * 5000],
        [Untouchable] * 4000, DXO("other", {"a": torch.ones(1000)}), endless(),
    ],
    ids=range(13),
)  # fmt: skip
def test_nothing_makes_the_count_raise_or_small(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "_MOST_ITEMS", 10_000)
    message = weights({"a": value})
    assert serialised_bytes(message) >= 4000


def test_what_an_update_may_have() -> None:
    assert size_fault(SPEC.bytes + 4000, SPEC, control=False) == ""
    assert size_fault(2 * SPEC.bytes + 4000, SPEC, control=True) == ""
    most = SPEC.bytes + (1 << 20) + 2 * 1024 + 2
    assert size_fault(most, SPEC, control=False) == ""
    assert size_fault(most + 1, SPEC, control=False).endswith(f"at most {most} are expected")


KINDS = {
    "another shape": "at most",
    "another name": "at most",
    "another dtype": "at most",
    "bytes": "at most",
    "text": "at most",
    "coded": "at most",
    "coded and plain": "at most",
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_update_is_refused_before_it_is_held_twice(kind: str) -> None:
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / "large_update.py"), kind, str(LARGE)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] >= LARGE
    assert KINDS[kind] in found["reason"]
    assert found["grown"] < LARGE / 10, found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_what_is_measured_sees_a_copy() -> None:
    from large_update import peak

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak()
    assert len(bytes(bytearray(b"1") * 50_000_000)) == 50_000_000
    assert peak() - before > 40_000_000
