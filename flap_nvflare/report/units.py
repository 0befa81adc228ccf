"""Numbers as a reader wants them: few digits, with their unit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

DASH = "\N{EN DASH}"  # between two numbers, and for none
NONE = DASH
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def bytes_text(value: float | None) -> str:
    """Bytes in powers of 1000, three digits: "7.39 MB"."""
    if value is None:
        return NONE
    unit = 0
    while value >= 999.5 and unit < len(_BYTES) - 1:
        value, unit = value / 1000, unit + 1
    return f"{digits(value) if unit else f'{value:.0f}'} {_BYTES[unit]}"


def seconds_text(value: float | None) -> str:
    """A duration: "0.4 s", "52 s", "4 min 53 s", "2 h 05 min"."""
    if value is None:
        return NONE
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:.1f} days"


def dice_text(value: float | None) -> str:
    """Three decimals, as Dice and NSD are given."""
    return NONE if value is None else f"{value:.3f}"


def signed_text(value: float | None) -> str:
    """A difference with its sign and three decimals; a true minus, not a hyphen."""
    return NONE if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def millimetres_text(value: float | None) -> str:
    """One decimal; the column's head names the unit."""
    return NONE if value is None else f"{value:.1f}"


def percent_text(value: float | None) -> str:
    """A share in percent, two digits that count."""
    if value is None:
        return NONE
    return f"{digits(100 * value, 2)} %"


def times_text(value: float | None) -> str:
    """A ratio: "9.7", "49", "2,063"."""
    return NONE if value is None else digits(value, 2 if value < 100 else 4)


def axis_texts(ticks: Sequence[float], unit: str = "") -> list[str]:
    """Labels of an even scale, all with the decimals that its step needs."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=0.0)
    if 0 < step < 1e-4:
        return [f"{tick:g}{unit}" for tick in ticks]
    decimals = next((n for n in range(9) if abs(round(step, n) - step) < 1e-6 * step), 9)
    return [f"{tick:,.{decimals}f}{unit}" for tick in ticks]


def decade_texts(ticks: Sequence[float]) -> list[str]:
    """Labels of a scale of powers of ten, in bytes: "10 kB"."""
    return [bytes_text(tick).replace(".00", "").replace(".0", "") for tick in ticks]


def digits(value: float, most: int = 3) -> str:
    """So many digits that count, without an exponent for the sizes that occur."""
    if value == 0:
        return "0"
    value = float(f"{value:.{most - 1}e}")  # before its digits are counted: 0.9996 has one before
    size = abs(value)
    if size < 1e-4 or size >= 1e15:
        return f"{value:.{most - 1}e}"
    before = len(str(int(size))) if size >= 1 else 0
    if size >= 1:
        return f"{value:,.{max(0, most - before)}f}"
    zeros = 0
    while size < 0.1:
        size, zeros = size * 10, zeros + 1
    return f"{value:.{most + zeros}f}"


def plain_text(value: object, depth: int = 3) -> str:
    """A setting's value: lists with commas, nothing as a dash; what lies deeper as "…"."""
    if value is None or value == "" or value == [] or value == {}:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, dict)) and depth == 0:
        return "…"
    if isinstance(value, list):
        return ", ".join(plain_text(one, depth - 1) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain_text(one, depth - 1)}" for name, one in value.items())
    return str(value)
