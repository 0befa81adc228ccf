"""The one error of this room."""

from __future__ import annotations


class DataError(ValueError):
    """Scans, masks or their table cannot be used; the message names file, value and mend."""
