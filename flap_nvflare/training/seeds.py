"""One seed for every purpose, the same in every process."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed from 0 to 2^31 - 1 that depends on every part and on nothing else.

    Python's own `hash` of text differs from process to process; SHA-256 does not. The parts
    are joined by a byte that no text holds, so ("a", "bc") and ("ab", "c") differ.
    """
    text = b"\x00".join(str(part).encode("utf-8") for part in parts)
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % 2**31
