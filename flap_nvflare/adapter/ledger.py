"""The ledger: serialised bytes by round, site and direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIRECTIONS = ("up", "down")


class Ledger:
    """Counts bytes; `up` is from a site to the server, `down` the other way."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[int, str, str], int] = {}

    def add(self, round_index: int, site: str, direction: str, count: int) -> None:
        """Adds a message of `count` bytes.

        Raises:
            ValueError: on another direction or a negative count.
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction {direction!r}; expected one of {DIRECTIONS}")
        if count < 0:
            raise ValueError(f"a message of {count} bytes; expected zero or more")
        key = (round_index, site, direction)
        self._bytes[key] = self._bytes.get(key, 0) + count

    def bytes(self, round_index: int, site: str, direction: str) -> int:
        """Bytes of one round, site and direction; 0 if nothing was sent."""
        return self._bytes.get((round_index, site, direction), 0)

    def sites(self, round_index: int) -> list[str]:
        """Sites with any message in a round, sorted."""
        return sorted({s for (r, s, _) in self._bytes if r == round_index})

    def site_bytes(self, site: str, direction: str) -> int:
        """Bytes of a site in all rounds."""
        return sum(n for (_, s, d), n in self._bytes.items() if (s, d) == (site, direction))

    def round_bytes(self, round_index: int, direction: str) -> int:
        """Bytes of all sites in a round."""
        return sum(n for (r, _, d), n in self._bytes.items() if (r, d) == (round_index, direction))

    def total(self, direction: str) -> int:
        """Bytes of all sites in all rounds."""
        return sum(n for (_, _, d), n in self._bytes.items() if d == direction)

    def to_dict(self) -> dict[str, Any]:
        """Plain rows, sorted; `from_dict` reads them back."""
        return {
            "rows": [
                {"round": r, "site": s, "direction": d, "bytes": n}
                for (r, s, d), n in sorted(self._bytes.items())
            ]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ledger:
        """A ledger from `to_dict`.

        Raises:
            ValueError: if `values` are not a ledger's.
        """
        ledger = cls()
        try:
            for row in values["rows"]:
                ledger.add(row["round"], row["site"], row["direction"], row["bytes"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no ledger: {error!r}; expected the result of to_dict") from error
        return ledger
