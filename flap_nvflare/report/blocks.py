"""Bars and intervals that the page draws with HTML alone; positions are percent of their track."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flap_nvflare.report.charts import Tick, nice_axis
from flap_nvflare.report.figures import TIMINGS
from flap_nvflare.report.scores import Spread
from flap_nvflare.report.units import DASH, axis_texts, dice_text, seconds_text, signed_text
from flap_nvflare.report.values import number, shown

MOST_ROWS = 24  # of intervals and bars; tables hold all
_MOST_STACKS = 12
TIMING_NAMES = {
    "open": "loading",
    "read": "reading scans",
    "steps": "training",
    "evaluate": "validating",
    "save": "saving",
}


@dataclass(frozen=True)
class Interval:
    """A point with an interval, if there is one."""

    name: str
    note: str
    text: str
    at: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Forest:
    """Intervals below each other on one scale."""

    rows: tuple[Interval, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Bar:
    """A bar to the right of zero, or to the left of it."""

    name: str
    text: str
    left: float
    width: float
    negative: bool


@dataclass(frozen=True)
class Part:
    """A part of a stacked bar."""

    role: str
    width: float
    label: str


@dataclass(frozen=True)
class Stack:
    """A bar of parts."""

    name: str
    text: str
    parts: tuple[Part, ...]


def forest(named: Sequence[tuple[str, str, Spread]]) -> Forest | None:
    """Name, note and figure of each row, drawn on one scale; None if there is no figure."""
    ends = [end for _, _, one in named for end in (one.mean, one.low, one.high) if end is not None]
    if not ends:
        return None
    axis = nice_axis(min(ends), max(ends), limits=(0.0, 1.0))

    def at(value: float | None) -> float | None:
        return None if value is None else min(100.0, max(0.0, axis.place(value)))

    ticks = tuple(
        Tick(axis.place(tick), text)
        for tick, text in zip(axis.ticks, axis_texts(axis.ticks), strict=True)
    )
    rows = [
        Interval(
            shown(name, 40), note, spread_text(one), at(one.mean) or 0.0, at(one.low), at(one.high)
        )
        for name, note, one in named
        if one.mean is not None
    ][:MOST_ROWS]
    return Forest(tuple(rows), ticks)


def spread_text(one: Spread) -> str:
    """A figure and its interval: "0.749 (0.71-0.79)"."""
    if one.low is None or one.high is None:
        return dice_text(one.mean)
    return f"{dice_text(one.mean)} ({one.low:.3f}{DASH}{one.high:.3f})"


def gain_bars(by_site: Mapping[str, object]) -> tuple[Bar, ...]:
    """A bar of each site's gain, all on one scale with zero in it."""
    known = {site: value for site, one in by_site.items() if (value := number(one)) is not None}
    low, high = min([0.0, *known.values()]), max([0.0, *known.values()])
    reach = (high - low) or 1.0
    zero = -low / reach
    return tuple(
        Bar(
            name=shown(site),
            text=signed_text(value),
            left=round(100 * (zero + min(value, 0.0) / reach), 3),
            width=round(100 * abs(value) / reach, 3),
            negative=value < 0,
        )
        for site, value in list(known.items())[:MOST_ROWS]
    )


def time_stacks(spent: Mapping[str, Mapping[str, float]]) -> tuple[Stack, ...]:
    """Mean seconds of a round by site, the slowest first; of many sites the slowest dozen."""
    totals = {site: sum(parts.values()) for site, parts in spent.items()}
    longest = max(totals.values(), default=0.0) or 1.0
    slowest = sorted(totals, key=lambda site: -totals[site])[:_MOST_STACKS]
    return tuple(
        Stack(
            name=shown(site),
            text=seconds_text(totals[site]),
            parts=tuple(
                Part(
                    f"s{place}",
                    round(100 * spent[site][name] / longest, 3),
                    f"{TIMING_NAMES[name]}: {seconds_text(spent[site][name])}",
                )
                for place, name in enumerate(TIMINGS)
                if spent[site].get(name)
            ),
        )
        for site in slowest
    )


def timing_legend(spent: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """Name and colour of the parts that occur."""
    return [
        (TIMING_NAMES[name], f"s{place}")
        for place, name in enumerate(TIMINGS)
        if any(parts.get(name) for parts in spent.values())
    ]
