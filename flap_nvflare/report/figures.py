"""The figures of a run's rounds: Dice, loss, bytes, errors, seconds, privacy, faults.

Rounds are counted from 1 here. A site scores the adapter that it receives, so the Dice in the line
of round k + 1 is that of the adapter after k rounds; of a site alone it is that after its round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flap_nvflare.report.read import Run
from flap_nvflare.report.values import count, mapping, mean, number, rows, share, texts

BYTES_OF_A_NUMBER = 4  # full fine-tuning sends float32
TIMINGS = ("open", "evaluate", "read", "steps", "save")
Points = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Traffic:
    """Bytes of all messages of a round, or of several.

    Attributes:
        up, down: from the sites to the server, and back.
        full_up, full_down: what full fine-tuning would have sent in as many messages; None where
            the run does not say how many numbers that are.
    """

    up: int
    down: int
    full_up: int | None
    full_down: int | None

    @property
    def total(self) -> int:
        """Both ways."""
        return self.up + self.down

    @property
    def full(self) -> int | None:
        """Both ways of full fine-tuning."""
        if self.full_up is None or self.full_down is None:
            return None
        return self.full_up + self.full_down

    @property
    def fewer(self) -> float | None:
        """How many times fewer bytes than full fine-tuning."""
        return self.full / self.total if self.full and self.total else None


@dataclass(frozen=True)
class Fault:
    """Answers that did not count, alike but for their round.

    Attributes:
        site: whose.
        what: `refused`, `no answer` or `left out by the rule`.
        key: the tensor at fault; empty if it was the whole message.
        reason: what was wrong.
        rounds: in which rounds.
    """

    site: str
    what: str
    key: str
    reason: str
    rounds: tuple[int, ...]


def round_number(run: Run, position: int) -> int:
    """The round of a line, from 1."""
    said = number(run.rounds[position].get("round"))
    return position + 1 if said is None else int(said) + 1


def dice_by_site(run: Run) -> dict[str, Points]:
    """Validation Dice, mean over the classes: (rounds behind the adapter, Dice) by site."""
    found = _by_site(run, lambda report: share(mapping(report.get("dice")).get("mean")))
    if not run.alone:
        found = {site: [(x - 1, y) for x, y in points] for site, points in found.items()}
    for site, dice in mapping(run.description.get("validation_dice_last")).items():
        found.setdefault(site, []).append((len(run.rounds), share(mapping(dice).get("mean"))))
    known: dict[str, Points] = {
        site: [(x, y) for x, y in points if y is not None] for site, points in found.items()
    }
    return {site: points for site, points in known.items() if points}


def loss_by_site(run: Run) -> dict[str, Points]:
    """Mean training loss: (round, loss) by site."""
    found = _by_site(run, lambda report: number(report.get("loss")))
    return {site: points for site, points in found.items() if any(y is not None for _, y in points)}


def mean_of_sites(by_site: dict[str, Points]) -> Points:
    """Mean at every x over the sites that have a figure there."""
    at: dict[float, list[float | None]] = {}
    for points in by_site.values():
        for x, y in points:
            at.setdefault(x, []).append(y)
    return [(x, mean(at[x])) for x in sorted(at)]


def traffic(run: Run) -> list[tuple[int, Traffic]]:
    """Bytes by round."""
    numbers = count(run.description.get("full_parameters"))
    full = BYTES_OF_A_NUMBER * numbers if numbers else None
    found = []
    for position, line in enumerate(run.rounds):
        ways = [mapping(way) for way in mapping(line.get("bytes")).values()]
        up = [count(way.get("up")) for way in ways]
        down = [count(way.get("down")) for way in ways]
        one = Traffic(
            sum(up),
            sum(down),
            None if full is None else full * sum(n > 0 for n in up),
            None if full is None else full * sum(n > 0 for n in down),
        )
        found.append((round_number(run, position), one))
    return found


def total_traffic(run: Run) -> Traffic:
    """Bytes of all rounds, without the evaluation at the end."""
    each = [one for _, one in traffic(run)]
    known = all(one.full is not None for one in each) and bool(each)
    return Traffic(
        sum(one.up for one in each),
        sum(one.down for one in each),
        sum(one.full_up or 0 for one in each) if known else None,
        sum(one.full_down or 0 for one in each) if known else None,
    )


def evaluation_bytes(run: Run) -> int:
    """Bytes of the last evaluation: what the run counted beyond its rounds; 0 before its end."""
    if not run.finished:
        return 0
    said = mapping(run.description.get("bytes"))
    return max(0, count(said.get("up")) + count(said.get("down")) - total_traffic(run).total)


def site_bytes(run: Run, site: str) -> tuple[int, int]:
    """Bytes that a site sent and received in the rounds."""
    ways = [mapping(mapping(line.get("bytes")).get(site)) for line in run.rounds]
    return sum(count(way.get("up")) for way in ways), sum(count(way.get("down")) for way in ways)


def errors(run: Run) -> Points:
    """Relative error of the aggregate by round; None of what the server could not read."""
    return [
        (round_number(run, position), number(line.get("aggregation_error")))
        for position, line in enumerate(run.rounds)
    ]


def seconds_by_round(run: Run) -> dict[str, Points]:
    """Seconds of each round: the whole, its slowest site, and the server's aggregation."""
    found: dict[str, Points] = {"whole round": [], "slowest site": [], "aggregation": []}
    for position, line in enumerate(run.rounds):
        x = round_number(run, position)
        sites = [number(mapping(one).get("seconds")) for one in mapping(line.get("sites")).values()]
        slowest = max((one for one in sites if one is not None), default=None)
        values = (number(line.get("seconds")), slowest, number(line.get("aggregation_seconds")))
        for points, value in zip(found.values(), values, strict=True):
            points.append((x, value))
    if run.alone:
        found = {"training": found["whole round"]}
    return {name: points for name, points in found.items() if any(y is not None for _, y in points)}


def total_seconds(run: Run) -> float | None:
    """Seconds of all rounds."""
    known = [number(line.get("seconds")) for line in run.rounds]
    return sum(one for one in known if one is not None) if any(known) else None


def seconds_by_site(run: Run) -> dict[str, dict[str, float]]:
    """Mean seconds of a round by site and by what they were spent on."""
    spent: dict[str, list[dict[str, float]]] = {}
    for line in run.rounds:
        for site, report in mapping(line.get("sites")).items():
            report = mapping(report)
            parts = {name: number(mapping(report.get("timings")).get(name)) for name in TIMINGS}
            known = {name: max(0.0, value) for name, value in parts.items() if value is not None}
            if not known:
                known = {"steps": max(0.0, number(report.get("seconds")) or 0.0)}
            spent.setdefault(site, []).append(known)
    return {
        site: {name: sum(one.get(name, 0.0) for one in each) / len(each) for name in TIMINGS}
        for site, each in spent.items()
    }


def privacy(run: Run) -> dict[str, dict[str, Any]]:
    """Each site's last statement of its privacy budget; empty without differential privacy."""
    found: dict[str, dict[str, Any]] = {}
    for line in run.rounds:
        for site, report in mapping(line.get("sites")).items():
            if statement := mapping(mapping(report).get("privacy")):
                found[site] = statement
    return found


def epsilon(run: Run) -> float | None:
    """The largest epsilon that any site has spent; None if none is said."""
    known = [number(one.get("epsilon_replace")) for one in privacy(run).values()]
    return max((one for one in known if one is not None), default=None)


def faults(run: Run) -> list[Fault]:
    """Answers that did not count, by site, those alike in all but the round as one."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for position, line in enumerate(run.rounds):
        at = round_number(run, position)
        each = [
            (one.get("site"), "refused", one.get("key"), one.get("reason"))
            for one in rows(line.get("refused"))
        ]
        silent = "neither a good nor a bad answer came in time"
        each += [(site, "no answer", "", silent) for site in texts(line.get("missing"))]
        by_rule = "too far from the others' updates"
        each += [
            (site, "left out by the rule", "", by_rule) for site in texts(line.get("excluded"))
        ]
        for site, what, key, reason in each:
            rounds = found.setdefault((str(site), what, str(key or ""), str(reason)), [])
            if at not in rounds:
                rounds.append(at)
    return [Fault(*key, tuple(rounds)) for key, rounds in sorted(found.items())]


def _by_site(run: Run, figure: Callable[[dict[str, Any]], float | None]) -> dict[str, Points]:
    """(round, figure) by site, where the site has a report."""
    found: dict[str, Points] = {}
    for position, line in enumerate(run.rounds):
        for site, report in mapping(line.get("sites")).items():
            point = (round_number(run, position), figure(mapping(report)))
            found.setdefault(site, []).append(point)
    return {site: found[site] for site in sorted(found)}
