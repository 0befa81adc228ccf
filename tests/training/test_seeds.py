from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.training.seeds import derive_seed

PARTS = st.lists(st.integers(0, 9) | st.text("AB01", max_size=3), min_size=1, max_size=4)


def test_seed_is_the_head_of_a_hash_of_the_parts() -> None:
    digest = hashlib.sha256(b"0\x00A\x003").digest()
    assert derive_seed(0, "A", 3) == int.from_bytes(digest[:8], "big") % 2**31


def test_the_value_is_the_same_in_every_process() -> None:
    assert derive_seed(0, "A", 3) == 177151653


@given(PARTS, PARTS)
def test_other_parts_give_another_seed(one: list[int | str], other: list[int | str]) -> None:
    same = [str(part) for part in one] == [str(part) for part in other]
    assert (derive_seed(*one) == derive_seed(*other)) == same


def test_the_border_between_parts_counts() -> None:
    assert derive_seed("a", "bc") != derive_seed("ab", "c")
