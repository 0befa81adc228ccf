from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flap_nvflare.training.errors import StateError
from flap_nvflare.training.moments import load_moments, save_moments

Parameters = dict[str, torch.nn.Parameter]


def start(seed: int = 0) -> tuple[Parameters, torch.optim.AdamW]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"q.lora_a": (2, 3), "q.lora_b": (3, 2), "token": (4,)}
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=draw))
        for name, shape in shapes.items()
    }
    return parameters, torch.optim.AdamW(list(parameters.values()), lr=0.1, weight_decay=0.1)


def step(parameters: Parameters, optimizer: torch.optim.Optimizer, times: int) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        sum((p**2 + p).sum() for p in parameters.values()).backward()  # type: ignore[union-attr]
        optimizer.step()


def copy_weights(source: Parameters, target: Parameters) -> None:
    with torch.no_grad():
        for name, parameter in target.items():
            parameter.copy_(source[name])


def test_going_on_from_a_file_is_going_on(tmp_path: Path) -> None:
    parameters, optimizer = start()
    step(parameters, optimizer, 3)
    save_moments(tmp_path / "deep" / "m.safetensors", optimizer, parameters)
    others, other = start(seed=1)
    copy_weights(parameters, others)
    load_moments(tmp_path / "deep" / "m.safetensors", other, others, reset_factors=False)
    step(parameters, optimizer, 2)
    step(others, other, 2)
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m.safetensors"]


def test_turned_factors_lose_their_moments_and_nothing_else_does(tmp_path: Path) -> None:
    parameters, optimizer = start()
    step(parameters, optimizer, 3)
    save_moments(tmp_path / "m.safetensors", optimizer, parameters)
    others, other = start()
    load_moments(tmp_path / "m.safetensors", other, others, reset_factors=True)
    assert set(other.state) == {others["token"]}
    kept = other.state[others["token"]]
    assert float(kept["step"]) == 3
    assert torch.equal(kept["exp_avg"], optimizer.state[parameters["token"]]["exp_avg"])
    step(others, other, 1)
    assert float(other.state[others["q.lora_a"]]["step"]) == 1


def test_loading_forgets_what_the_optimiser_knew(tmp_path: Path) -> None:
    parameters, optimizer = start()
    save_moments(tmp_path / "fresh.safetensors", optimizer, parameters)
    step(parameters, optimizer, 1)
    load_moments(tmp_path / "fresh.safetensors", optimizer, parameters, reset_factors=False)
    assert not optimizer.state


def test_same_moments_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        parameters, optimizer = start()
        step(parameters, optimizer, 2)
        save_moments(tmp_path / name, optimizer, parameters)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    parameters, optimizer = start()
    step(parameters, optimizer, 1)
    good = tmp_path / "good.safetensors"
    save_moments(good, optimizer, parameters)
    tensors, metadata = load_file(good), {"format": "flap_nvflare.adamw.1"}

    def refused(bad: dict[str, torch.Tensor], match: str, **kept: dict[str, str]) -> None:
        save_file(bad, tmp_path / "bad", **{"metadata": metadata, **kept})  # type: ignore[arg-type]
        with pytest.raises(StateError, match=match):
            load_moments(tmp_path / "bad", optimizer, parameters, reset_factors=False)
        assert float(optimizer.state[parameters["token"]]["step"]) == 1

    refused({**tensors, "exp_avg/token": torch.zeros(5)}, r"exp_avg/token has shape \(5,\)")
    refused({**tensors, "exp_avg/other": torch.zeros(4)}, "exp_avg/other belongs to no parameter")
    refused({k: v for k, v in tensors.items() if k != "step/token"}, "token lacks one of")
    refused(tensors, "not a file of optimiser moments", metadata={})


@pytest.mark.parametrize("content", [None, b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "moments.safetensors"
    if content is not None:
        path.write_bytes(content)
    parameters, optimizer = start()
    with pytest.raises(StateError, match=r"moments\.safetensors: cannot be read"):
        load_moments(path, optimizer, parameters, reset_factors=False)


def test_moments_follow_their_parameters_layout(tmp_path: Path) -> None:
    """The fused step walks over storage: moments of another layout would be other entries'."""

    def run(through_file: bool) -> torch.Tensor:
        torch.manual_seed(0)
        kernel = torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)
        parameters = {"conv": torch.nn.Parameter(kernel)}
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.1, fused=True)
        for _ in range(2):
            step(parameters, optimizer, 2)
            if through_file:
                save_moments(tmp_path / "m.safetensors", optimizer, parameters)
                load_moments(tmp_path / "m.safetensors", optimizer, parameters, False)
        return parameters["conv"].detach()

    assert torch.equal(run(True), run(False))
