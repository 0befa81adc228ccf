from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from flap_nvflare.adapter import update
from flap_nvflare.adapter.update import (
    UpdateError,
    UpdateSpec,
    content_sha256,
    load_update,
    save_update,
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.lora_b": (4, 2), "q.lora_a": (2, 3), "head.scale": (), "head.none": (0, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def spec(tensors: Tensors) -> UpdateSpec:
    return UpdateSpec.of(tensors, "flap", 2, "ab" * 32)


def test_spec_counts_parameters_and_bytes(spec: UpdateSpec) -> None:
    assert spec.parameters == 4 * 2 + 2 * 3 + 1
    assert spec.bytes == 4 * spec.parameters
    half = UpdateSpec(spec.method, spec.rank, spec.base_sha256, spec.shapes, "float16")
    assert half.bytes == 2 * spec.parameters


def test_a_part_of_a_spec_has_its_names_at_the_rank_asked_for(spec: UpdateSpec) -> None:
    part = spec.part(["q.lora_b", "head.scale"])
    assert dict(part.shapes) == {"head.scale": (), "q.lora_b": (4, 2)}
    assert (part.method, part.base_sha256, part.rank) == ("flap", "ab" * 32, 2)
    wide = spec.part(spec.shapes, rank=5)
    assert wide.rank == 5
    assert wide.shapes["q.lora_a"] == (5, 3)
    assert wide.shapes["q.lora_b"] == (4, 5)
    assert wide.shapes["head.none"] == (0, 2)
    assert wide.part(spec.shapes, rank=2) == spec == spec.part(spec.shapes)
    with pytest.raises(KeyError, match=r"head\.other"):
        spec.part(["head.other"])


def test_spec_goes_through_json_and_back(spec: UpdateSpec) -> None:
    assert UpdateSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_spec_sha256_sees_every_field_but_no_order(spec: UpdateSpec) -> None:
    turned = {**spec.to_dict(), "shapes": dict(reversed(spec.to_dict()["shapes"].items()))}
    assert UpdateSpec.from_dict(turned).sha256 == spec.sha256
    changes = {"method": "lora", "rank": 3, "base_sha256": "", "dtype": "float16", "shapes": {}}
    others = {UpdateSpec.from_dict({**spec.to_dict(), k: v}).sha256 for k, v in changes.items()}
    assert len(others) == len(changes)
    assert spec.sha256 not in others


def test_spec_sha256_is_stable() -> None:
    # A spec is compared across machines and versions: this figure may never change.
    spec = UpdateSpec("flap", 2, "00", {"b": (1,), "a": (2, 3)})
    assert spec.sha256 == "1df35fb8679e9464b9bc43c93b13e4234c3719abd6e5f5267b872b45a8e12212"


@pytest.mark.parametrize(
    "change",
    [
        {"method": 1},
        {"rank": "2"},
        {"rank": True},
        {"rank": -1},
        {"base_sha256": None},
        {"dtype": "os"},
        {"dtype": "float31"},
        {"shapes": [1]},
        {"shapes": {"a": 3}},
        {"shapes": {"a": [1.0]}},
        {"shapes": {"a": [-1]}},
        {"shapes": {"a": [True]}},
        {"shapes": {1: [1]}},
        {"more": 1},
    ],
)
def test_a_bad_spec_is_refused(spec: UpdateSpec, change: dict[str, Any]) -> None:
    with pytest.raises(UpdateError, match="spec"):
        UpdateSpec.from_dict({**spec.to_dict(), **change})


@pytest.mark.parametrize("values", [None, [], "spec", {"method": "flap"}])
def test_what_is_no_spec_is_refused(values: object) -> None:
    with pytest.raises(UpdateError, match="exactly the fields"):
        UpdateSpec.from_dict(values)


def test_a_refused_spec_says_no_more_than_a_line(spec: UpdateSpec) -> None:
    for change in ({"method": ["x"] * 10**5}, {"shapes": {"n" * 10**5: "s" * 10**5}}):
        with pytest.raises(UpdateError) as caught:
            UpdateSpec.from_dict({**spec.to_dict(), **change})
        assert len(str(caught.value)) < 300


def test_one_spec_has_one_dtype() -> None:
    with pytest.raises(UpdateError, match=r"\['float16', 'float32'\]"):
        UpdateSpec.of({"a": torch.ones(1), "b": torch.ones(1).half()}, "flap", 1, "")
    with pytest.raises(UpdateError, match="one dtype"):
        UpdateSpec.of({}, "flap", 1, "")


def test_file_gives_back_what_was_written(
    tmp_path: Path, tensors: Tensors, spec: UpdateSpec
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_update(path, tensors, spec, {"round": "3"})
    loaded, loaded_spec, extra = load_update(path)
    assert list(loaded) == sorted(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert (loaded_spec, extra) == (spec, {"round": "3"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_other_dtypes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"x": torch.arange(5).to(dtype)}
    save_update(tmp_path / "x", tensors, UpdateSpec.of(tensors, "flap", 1, ""))
    assert torch.equal(load_update(tmp_path / "x")[0]["x"], tensors["x"])


def test_equal_content_gives_equal_bytes(
    tmp_path: Path, tensors: Tensors, spec: UpdateSpec
) -> None:
    extra = dict.fromkeys("abcdefgh", "value")
    save_update(tmp_path / "one", tensors, spec, extra)
    backwards = {name: tensors[name].clone() for name in reversed(tensors)}
    save_update(tmp_path / "two", backwards, spec, dict(reversed(extra.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_views_and_gradients_are_written_as_plain_values(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "part": whole[:, 1],
        "turned": whole.T,
        "same": whole,
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    save_update(tmp_path / "x", tensors, UpdateSpec.of(tensors, "flap", 1, ""))
    loaded = load_update(tmp_path / "x")[0]
    assert loaded["part"].tolist() == [1, 5, 9]
    assert torch.equal(loaded["turned"], loaded["same"].T)
    assert not loaded["trained"].requires_grad


def test_a_loaded_update_outlives_its_file(
    tmp_path: Path, tensors: Tensors, spec: UpdateSpec
) -> None:
    path = tmp_path / "x"
    save_update(path, tensors, spec)
    loaded = load_update(path)[0]
    with path.open("r+b") as file:
        file.truncate(8)
    assert torch.equal(loaded["q.lora_a"], tensors["q.lora_a"])


def test_tensors_must_meet_the_spec_when_written(
    tmp_path: Path, tensors: Tensors, spec: UpdateSpec
) -> None:
    wrong = {
        "only in the tensors": {**tensors, "more": torch.ones(1)},
        "only in the spec": {k: v for k, v in tensors.items() if k != "q.lora_a"},
        "its spec says": {**tensors, "q.lora_a": torch.ones(3, 2)},
        "float64": {**tensors, "q.lora_a": torch.ones(2, 3, dtype=torch.float64)},
    }
    for text, these in wrong.items():
        with pytest.raises(UpdateError, match=text):
            save_update(tmp_path / "x", these, spec)
    with pytest.raises(UpdateError, match="use str"):
        save_update(tmp_path / "x", tensors, spec, {"round": 3})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, tensors: Tensors, spec: UpdateSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    save_update(path, tensors, spec)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(update.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_update(path, {k: v + 1 for k, v in tensors.items()}, spec)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_synced_around_the_replacement(
    tmp_path: Path, tensors: Tensors, spec: UpdateSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "x", []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        seen.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))
        sync(descriptor)

    monkeypatch.setattr(update.os, "fsync", watched)
    save_update(path, tensors, spec)
    (first, there_before), (second, there_after) = seen
    assert (first.parent, second) == (tmp_path, tmp_path)
    assert (there_before, there_after) == (False, True)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm-done",)


def test_files_that_are_no_update_are_named_with_the_mend(
    tmp_path: Path, tensors: Tensors, spec: UpdateSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_update(tmp_path / "good", tensors, spec)
    whole = (tmp_path / "good").read_bytes()
    files = {
        "empty": b"",
        "text": b"no tensors at all, only a line of text",
        "pickle": pickle.dumps(Harmful()),
        **{f"cut-{size}": whole[:size] for size in (4, 8, 100, len(whole) - 1)},
        "longer": whole + b"\0",
    }
    torch.save(tensors, tmp_path / "torch.pt")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in (*files, "torch.pt", "folder"):
        with pytest.raises(UpdateError, match=f"{name}: no whole safetensors.*make it again"):
            load_update(tmp_path / name)
    with pytest.raises(UpdateError, match="missing: there is no such file; check the path"):
        load_update(tmp_path / "missing")
    assert not (tmp_path / "harm-done").exists()


def test_files_without_a_true_spec_are_refused(
    tmp_path: Path, tensors: Tensors, spec: UpdateSpec
) -> None:
    path = tmp_path / "x"

    def written(values: object) -> Path:
        save_file(tensors, path, {"flap_spec": json.dumps(values)})
        return path

    save_file(tensors, path)
    with pytest.raises(UpdateError, match=r"x: has no spec in its metadata; name a file"):
        load_update(path)
    for values in (None, 3, {}, {"spec": {}, "extra": {}}, {"spec": spec.to_dict(), "extra": 1}):
        with pytest.raises(UpdateError, match="x: the spec in its metadata is damaged"):
            load_update(written(values))
    path.write_bytes(save(tensors, {"flap_spec": "{"}))
    with pytest.raises(UpdateError, match="damaged"):
        load_update(path)
    for change, text in (
        ({"shapes": {}}, "only in the tensors"),
        ({"shapes": {**spec.shapes, "more": [1]}}, "'more' is only in the spec"),
        ({"shapes": {**spec.shapes, "q.lora_a": [3, 2]}}, "'q.lora_a' is .* its spec says"),
        ({"dtype": "float16"}, "its spec says"),
    ):
        with pytest.raises(UpdateError, match=text):
            load_update(written({"spec": {**spec.to_dict(), **change}, "extra": {}}))


def test_content_sha256_sees_names_shapes_dtypes_and_values(tensors: Tensors) -> None:
    digest = content_sha256(tensors)
    assert content_sha256({name: tensors[name] for name in reversed(tensors)}) == digest
    a = tensors["q.lora_a"]
    others = [
        {**tensors, "q.lora_a": a.reshape(3, 2)},
        {**tensors, "q.lora_a": a.view(torch.int32)},
        {**tensors, "q.lora_a": torch.nextafter(a, a + 1)},
        {**tensors, "head.scale": -tensors["head.scale"]},
        {name + "x": tensor for name, tensor in tensors.items()},
        {name: tensors[name] for name in list(tensors)[1:]},
        {},
    ]
    assert len({digest, *(content_sha256(other) for other in others)}) == len(others) + 1


def test_content_sha256_is_stable() -> None:
    tensors = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(0.5)}
    assert (
        content_sha256(tensors)
        == "cfe1e5123ec4374c5dae3d584194c2a61ac89b131f16a009cc278c6c24800cb8"
    )


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=4), st.integers(0, 6))
def test_content_sha256_does_not_confuse_where_a_tensor_ends(parts: list[bytes], at: int) -> None:
    def tensors(these: list[bytes]) -> Tensors:
        return {str(i): torch.tensor(list(x), dtype=torch.uint8) for i, x in enumerate(these)}

    head, *tail = parts
    moved = [head[:at], head[at:] + (tail[0] if tail else b""), *tail[1:]]
    same = tensors(moved).keys() == tensors(parts).keys() and moved == parts
    assert (content_sha256(tensors(moved)) == content_sha256(tensors(parts))) == same
