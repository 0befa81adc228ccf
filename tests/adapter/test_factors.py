from __future__ import annotations

import pytest
import torch

from flap_nvflare.adapter.factors import (
    LORA_A,
    LORA_B,
    Pair,
    of_rank,
    pairs,
    shape_of_rank,
    without_factors,
)


def test_pairs_are_found_among_other_tensors_and_sorted() -> None:
    names = ["z.q.lora_b", "head.weight", "a.v.lora_a", "z.q.lora_a", "a.v.lora_b"]
    assert pairs(names) == (
        Pair("a.v", "a.v.lora_a", "a.v.lora_b"),
        Pair("z.q", "z.q.lora_a", "z.q.lora_b"),
    )
    assert pairs(reversed(names)) == pairs(iter(names))


def test_a_pair_unpacks_into_stem_a_and_b() -> None:
    (stem, a, b) = pairs(["x" + LORA_A, "x" + LORA_B])[0]
    assert (stem, a, b) == ("x", "x.lora_a", "x.lora_b")


def test_no_adapter_no_pair() -> None:
    assert pairs([]) == pairs(["head.lora_a.weight", "lora_b"]) == ()


@pytest.mark.parametrize(("there", "missing"), [(LORA_A, LORA_B), (LORA_B, LORA_A)])
def test_half_a_pair_is_an_error_that_names_the_missing_half(there: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"'q{missing}' is missing"):
        pairs(["q" + there, "other"])


ADAPTER = {
    "q.lora_a": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    "q.lora_b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "head": torch.tensor([7.0, 8.0]),
}


def test_a_smaller_rank_has_the_first_rows_of_a_and_columns_of_b() -> None:
    cut = of_rank(ADAPTER, 1)
    assert cut["q.lora_a"].tolist() == [[1.0, 2.0, 3.0]]
    assert cut["q.lora_b"].tolist() == [[1.0], [3.0]]
    assert cut["head"] is ADAPTER["head"]
    assert all(tensor.is_contiguous() for tensor in cut.values())


def test_a_larger_rank_has_zeros_and_the_same_product() -> None:
    wide = of_rank(ADAPTER, 3)
    assert wide["q.lora_a"].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.0, 0.0, 0.0]]
    assert wide["q.lora_b"].tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]
    product = ADAPTER["q.lora_b"] @ ADAPTER["q.lora_a"]
    assert torch.equal(wide["q.lora_b"] @ wide["q.lora_a"], product)
    assert {name: t.tolist() for name, t in of_rank(wide, 2).items()} == {
        name: t.tolist() for name, t in ADAPTER.items()
    }


def test_the_same_rank_is_the_same_tensors() -> None:
    assert all(tensor is ADAPTER[name] for name, tensor in of_rank(ADAPTER, 2).items())


def test_only_factors_have_a_rank() -> None:
    assert shape_of_rank("q.lora_a", (2, 3), 5) == (5, 3)
    assert shape_of_rank("q.lora_b", (2, 2), 5) == (2, 5)
    assert shape_of_rank("q.lora_core", (2, 2), 5) == (2, 2)
    assert shape_of_rank("head", (), 5) == ()


def test_what_lies_in_a_turned_basis_is_zero() -> None:
    found = without_factors(ADAPTER)
    assert list(found) == list(ADAPTER)
    assert not found["q.lora_a"].any()
    assert not found["q.lora_b"].any()
    assert found["head"] is ADAPTER["head"]
    assert ADAPTER["q.lora_a"].any()
