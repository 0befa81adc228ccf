from __future__ import annotations

import pytest

from flap_nvflare.adapter.factors import LORA_A, LORA_B, Pair, pairs


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
