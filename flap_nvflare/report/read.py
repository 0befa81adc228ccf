"""A run's folder as the report sees it: a federation's, or that of a site that trained alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flap_nvflare.report.values import (
    ReportError,
    count,
    mapping,
    read_json,
    read_lines,
    shown,
    texts,
)

DESCRIPTION, ROUNDS, CROSS_SITE = "run.json", "rounds.jsonl", "cross_site.json"
SCORES, EVALUATION = "scores.json", "evaluation.json"
_NAME_OF_RUN = 80  # characters
DATA = ("synthetic", "sites' own")  # what run.json may say of the scans


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        name: the run's name.
        alone: whether one site trained by itself, without a federation.
        finished: whether the run came to its end.
        data: `synthetic`, `sites' own` or `unknown`.
        description: what `run.json` says, or of a site alone `scores.json`.
        federation: the settings.
        rounds: one dictionary a finished round, as in a federation's `rounds.jsonl`.
        cut: whether the file of the rounds ends in a broken line.
        sites: names of the sites, sorted.
        cross_site: scores by model and site on the sites' test cases.
        evaluation: what `flap-nvflare evaluate` wrote; empty if it was not run.
    """

    path: Path
    name: str
    alone: bool
    finished: bool
    data: str
    description: dict[str, Any]
    federation: dict[str, Any]
    rounds: tuple[dict[str, Any], ...]
    cut: bool
    sites: tuple[str, ...]
    cross_site: dict[str, dict[str, Any]]
    evaluation: dict[str, Any]

    @property
    def class_names(self) -> list[str]:
        """The foreground classes."""
        return texts(self.federation.get("class_names")) or texts(
            self.evaluation.get("class_names")
        )

    @property
    def split(self) -> str:
        """The cases that were scored: `test`, or what else the evaluation was asked for."""
        return "validation" if self.evaluation.get("split") == "validation" else "test"

    @property
    def planned(self) -> int:
        """Rounds that the settings ask for; those that are there if the settings are not."""
        return count(self.federation.get("rounds")) or len(self.rounds)

    def setting(self, name: str, default: Any = None) -> Any:
        """The setting of that name."""
        return self.federation.get(name, default)


def read_run(path: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ReportError: if it is no folder, holds no run, or a file in it is damaged.
    """
    if not path.is_dir():
        raise ReportError(f"{path}: no such folder; give the folder that holds {ROUNDS}")
    lines, cut = read_lines(path / ROUNDS)
    description, scores = read_json(path / DESCRIPTION), read_json(path / SCORES)
    evaluation = read_json(path / EVALUATION)
    if not (lines or cut or description or scores):
        raise ReportError(
            f"{path}: no run's folder; it has none of {ROUNDS}, {DESCRIPTION} and {SCORES}"
        )
    if not description and (scores or any("loss" in line for line in lines)):
        return _alone(path, lines, cut, scores, evaluation)
    data = description.get("data")
    cross = {model: mapping(by) for model, by in read_json(path / CROSS_SITE).items()}
    return Run(
        path=path,
        name=shown(description.get("run") or path.resolve().name, _NAME_OF_RUN),
        alone=False,
        finished=description.get("finished") is True,
        data=_data(data, evaluation, [mapping(line.get("sites")) for line in lines]),
        description=description,
        federation=mapping(description.get("federation")),
        rounds=tuple(lines),
        cut=cut,
        sites=_sites(description, lines, cross),
        cross_site=cross,
        evaluation=evaluation,
    )


def _alone(
    path: Path,
    lines: list[dict[str, Any]],
    cut: bool,
    scores: dict[str, Any],
    evaluation: dict[str, Any],
) -> Run:
    """A site's own run, its rounds in the form of a federation's of one site."""
    site = str(scores.get("site") or "alone")
    rounds = [
        {"round": line.get("round"), "seconds": line.get("seconds"), "sites": {site: line}}
        for line in lines
    ]
    test = mapping(scores.get("test"))
    return Run(
        path=path,
        name=shown(path.resolve().name, _NAME_OF_RUN),
        alone=True,
        finished=bool(scores),
        data=_data(None, evaluation, [{site: scores}]),
        description=scores,
        federation=mapping(scores.get("federation")),
        rounds=tuple(rounds),
        cut=cut,
        sites=(site,),
        cross_site={str(scores.get("adapter") or "last"): {site: test}} if test else {},
        evaluation=evaluation,
    )


def _data(said: Any, evaluation: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """What the scans were; one site on synthetic ones makes the whole run so."""
    reports = [mapping(report) for by_site in lines for report in by_site.values()]
    if any(report.get("synthetic") is True for report in reports) or said == DATA[0]:
        return DATA[0]
    if said == DATA[1] or (reports and all(one.get("synthetic") is False for one in reports)):
        return DATA[1]
    if isinstance(evaluation.get("synthetic"), bool):
        return DATA[0] if evaluation["synthetic"] else DATA[1]
    return "unknown"


def _sites(
    description: dict[str, Any], lines: list[dict[str, Any]], cross: dict[str, dict[str, Any]]
) -> tuple[str, ...]:
    named = set(texts(description.get("sites")))
    for line in lines:
        named |= {*mapping(line.get("sites")), *texts(line.get("taking_part"))}
    for by_site in cross.values():
        named |= set(by_site)
    return tuple(sorted(named, key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts site-2 before site-10."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return [(int(part), "") if part.isascii() and part.isdigit() else (0, part) for part in parts]
