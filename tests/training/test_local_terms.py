"""Terms added to gradients, by hand and against autograd, on MONAI's own trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.engines import SupervisedTrainer

from flap_nvflare.training.errors import StateError
from flap_nvflare.training.local_terms import LocalTerms, Pull, Terms

Tensors = dict[str, torch.Tensor]


def parameters(core: bool, seed: int, rank: int = 2) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"q.lora_a": (rank, 4), "q.lora_b": (3, rank), "token": (2,)}
    if core:
        shapes = {"q.lora_core": (rank, rank), "token": (2,)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
        for name, shape in shapes.items()
    }


def zero_gradients(made: dict[str, torch.nn.Parameter]) -> None:
    for parameter in made.values():
        parameter.grad = torch.zeros_like(parameter)


def values(made: dict[str, torch.nn.Parameter]) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in made.items()}


def test_pull_of_factors_by_hand() -> None:
    made = {"token": torch.nn.Parameter(torch.tensor([3.0, 5.0]))}
    made["token"].grad = torch.tensor([10.0, 20.0])
    terms = LocalTerms(made)
    terms.set(Terms(Pull(0.5, "factors", {"token": torch.tensor([1.0, 9.0])})))
    terms()
    assert made["token"].grad.tolist() == [10.0 + 0.5 * 2, 20.0 - 0.5 * 4]


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_pull_of_products_is_autograds(core: bool, rank: int, seed: int) -> None:
    made = parameters(core, seed, rank)
    anchor = values(parameters(core, seed + 1, rank))
    fixed = {
        "q.lora_a": torch.randn(rank, 4, dtype=torch.float64),
        "q.lora_b": torch.randn(3, rank, dtype=torch.float64),
    }

    def product(factors: Tensors) -> torch.Tensor:
        if core:
            return fixed["q.lora_b"] @ factors["q.lora_core"] @ fixed["q.lora_a"]
        return factors["q.lora_b"] @ factors["q.lora_a"]

    loss = (product(made) - product(anchor)).square().sum()  # type: ignore[arg-type]
    loss = 0.35 * (loss + (made["token"] - anchor["token"]).square().sum())
    expected = torch.autograd.grad(loss, list(made.values()))
    zero_gradients(made)
    terms = LocalTerms(made, fixed if core else {})
    terms.set(Terms(Pull(0.7, "products", anchor)))
    terms()
    for parameter, gradient in zip(made.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_pull_of_products_does_not_see_the_basis() -> None:
    made = parameters(False, 0)
    turn = torch.randn(2, 2, dtype=torch.float64)
    anchor = values(made)
    anchor["q.lora_b"], anchor["q.lora_a"] = (
        anchor["q.lora_b"] @ turn,
        torch.linalg.solve(turn, anchor["q.lora_a"]),
    )
    for on, still in (("products", True), ("factors", False)):
        zero_gradients(made)
        terms = LocalTerms(made)
        terms.set(Terms(Pull(1.0, on, anchor)))
        terms()
        largest = max(float(parameter.grad.abs().max()) for parameter in made.values())
        assert (largest < 1e-12) is still


def test_a_frozen_factor_takes_part_in_the_product_and_gets_no_gradient() -> None:
    made = parameters(False, 0)
    a = made.pop("q.lora_a").detach()
    anchor = values(made)
    zero_gradients(made)
    with torch.no_grad():
        made["q.lora_b"] += 1.0
    terms = LocalTerms(made, {"q.lora_a": a})
    terms.set(Terms(Pull(1.0, "products", anchor)))
    terms()
    expected = torch.ones(3, 2, dtype=torch.float64) @ (a @ a.T)
    torch.testing.assert_close(made["q.lora_b"].grad, expected)


def test_an_adapter_with_a_private_factor_is_pulled_by_its_shared_one() -> None:
    made = parameters(False, 0)
    anchor = {"q.lora_a": torch.zeros(2, 4)}
    zero_gradients(made)
    terms = LocalTerms(made)
    terms.set(Terms(Pull(2.0, "products", anchor)))
    terms()
    assert torch.equal(made["q.lora_a"].grad, 2.0 * made["q.lora_a"])
    assert not made["q.lora_b"].grad.any()
    assert not made["token"].grad.any()


def test_what_no_gradient_reaches_stays_without() -> None:
    made = parameters(False, 0)
    terms = LocalTerms(made)
    names = list(made)
    terms.set(Terms(Pull(1.0, "products", values(made)), values(made), names))
    terms()
    assert all(parameter.grad is None for parameter in made.values())
    assert all(not tensor.any() for tensor in terms.mean().values())


def toy(terms: Terms, through: Path | None = None) -> tuple[list[float], float]:
    """Two steps of descent at rate 0.1 on 1/2 (w x - y)^2: (x, y) = (1, 2), then (2, 1)."""
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 1.0)
    handler = LocalTerms({"w": network.weight})
    handler.set(terms)
    if through is not None:
        handler.save(through)
        handler = LocalTerms({"w": network.weight})
        handler.load(through)
    steps: list[float] = []
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[
            {"image": torch.tensor([[x]]), "label": torch.tensor([[y]])}
            for x, y in ((1.0, 2.0), (2.0, 1.0))
        ],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=lambda out, y: 0.5 * (out - y).square(),
        decollate=False,
        train_handlers=[handler],
    ).run()
    steps.append(network.weight.item())
    collected = handler.mean().get("w", torch.zeros(1))
    if through is not None:
        handler.save_collected(through)
        other = LocalTerms({"w": network.weight})
        other.set(terms)
        other.load_collected(through)
        assert other.mean().keys() == handler.mean().keys()
        assert all(torch.equal(t, collected) for t in other.mean().values())
    return steps, float(collected)


@pytest.mark.parametrize("files", [False, True])
def test_two_steps_with_a_shift_by_hand(files: bool, tmp_path: Path) -> None:
    path = tmp_path / "terms.safetensors" if files else None
    # w = 1: gradient (1 - 2) 1 = -1, with the shift 0.5: -0.5, w = 1.05.
    # w = 1.05: gradient (2.1 - 1) 2 = 2.2, with the shift: 2.7, w = 0.78.
    (weight,), mean = toy(Terms(shift={"w": torch.full((1, 1), 0.5)}, collect=["w"]), path)
    assert weight == pytest.approx(0.78, abs=1e-6)
    assert mean == pytest.approx((-1 + 2.2) / 2, abs=1e-6)  # of the raw gradients


@pytest.mark.parametrize("files", [False, True])
def test_two_steps_with_a_pull_by_hand(files: bool, tmp_path: Path) -> None:
    path = tmp_path / "terms.safetensors" if files else None
    # At the anchor no pull: w = 1 + 0.1. Then (2.2 - 1) 2 = 2.4 and the pull 3 * 0.1.
    (weight,), mean = toy(Terms(Pull(3.0, "factors", {"w": torch.ones(1, 1)})), path)
    assert weight == pytest.approx(1.1 - 0.1 * 2.7, abs=1e-6)
    assert mean == 0.0  # nothing was asked for


def test_without_terms_nothing_happens() -> None:
    (weight,), _ = toy(Terms())
    assert weight == pytest.approx(1.1 - 0.1 * 2.4, abs=1e-6)


@pytest.mark.parametrize(
    ("terms", "match"),
    [
        (lambda: Terms(Pull(1.0, "factors", {"other": torch.zeros(2)})), "anchor 'other'"),
        (lambda: Terms(shift={"token": torch.zeros(3)}), r"shift 'token' \(3,\)"),
        (lambda: Terms(collect=["other"]), "'other' to collect"),
        (lambda: Terms(Pull(-1.0, "factors", {})), "weight -1.0"),
        (lambda: Terms(Pull(float("nan"), "factors", {})), "weight nan"),
        (lambda: Terms(Pull(1.0, "sums", {})), "'sums'"),
    ],
)
def test_terms_that_do_not_fit(terms: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LocalTerms(parameters(False, 0)).set(terms())  # type: ignore[operator]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    terms = LocalTerms(parameters(False, 0))
    path = tmp_path / "terms.safetensors"
    with pytest.raises(StateError, match="cannot be read"):
        terms.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(StateError, match="cannot be read"):
        terms.load(path)
