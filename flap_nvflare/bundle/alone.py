"""A site that trains by itself: every round in sequence, without a federation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from flap_nvflare.adapter.update import load_update, save_update, write_atomic
from flap_nvflare.bundle.trained import BEST_FILE, LAST_FILE, SETTINGS, put_on
from flap_nvflare.settings import SettingsError
from flap_nvflare.training.scores import SiteScore
from flap_nvflare.training.work import Progress, SiteWork

logger = logging.getLogger(__name__)

MOMENTS = "moments-{:05d}.safetensors"
ROUNDS = "rounds.jsonl"
SCORES = "scores.json"


class Alone:
    """Trains a site through all rounds and leaves adapters and scores in a folder.

    The folder then holds `adapter_last.safetensors`, `adapter_best.safetensors` (best Dice
    on the validation cases; absent without any), `rounds.jsonl`, `scores.json` with the
    scores on validation and test cases, and the moments to go on with. Of several processes
    that train together all score, and the first alone writes and logs.

    Args:
        work: the site's parts.
        output_dir: folder for the files.
        surface_tolerance: mm; a number adds NSD and HD95 to the final scores.
    """

    def __init__(
        self, work: SiteWork, output_dir: str | Path, surface_tolerance: float | None = None
    ) -> None:
        self.work = work
        self.folder = Path(output_dir)
        self.surface_tolerance = surface_tolerance

    def train(self, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
        """Trains all rounds and scores the last adapter.

        Args:
            resume: go on after the last whole round in the folder; without it a folder
                that holds a run is refused.
            progress: told of every step, as `SiteWork.train` tells.

        Returns:
            What `scores.json` holds.

        Raises:
            SettingsError: if the folder holds a run and `resume` is false.
        """
        lines = self._start(resume)
        known = [line["dice"]["mean"] for line in lines]
        best = max((dice for dice in known if dice is not None), default=None)
        for index in range(len(lines), self.work.federation.rounds):
            report = self.work.train(index, progress=progress)
            score = self.work.evaluate("validation")
            dice = score.dice
            if dice is not None and (best is None or dice > best):
                best = dice
                if self.work.ranks.first:
                    self._save(BEST_FILE, index)
            lines.append(
                {
                    "round": index,
                    **report.to_dict(),
                    "dice": {**score.by_class(), "mean": dice},
                }
            )
            if self.work.ranks.first:
                self._keep(index, lines)
        return self._score("last", ("validation", "test"))

    def evaluate(self, adapter_file: str | Path, split: str) -> dict[str, Any]:
        """Scores the adapter of a file on one split and writes `scores.json`.

        Raises:
            UpdateError: if the file is damaged.
            SettingsError: if it was made for another base, method or rank.
        """
        self._load(Path(adapter_file))
        return self._score(str(adapter_file), (split,))

    def _start(self, resume: bool) -> list[dict[str, Any]]:
        """The lines of the rounds already done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / LAST_FILE).exists():
            return []
        if not resume:
            raise SettingsError(
                f"{self.folder} holds a run already; give --resume true to go on with it, or "
                f"another --output_dir"
            )
        text = (self.folder / ROUNDS).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        done = int(self._load(self.folder / LAST_FILE)["round"])
        self.work.load_state(self.folder / MOMENTS.format(done), reset_factors=False)
        return lines[: done + 1]

    def _keep(self, index: int, lines: list[dict[str, Any]]) -> None:
        """Writes the round that has ended."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomic(self.folder / ROUNDS, text.encode())
        # The last adapter names the round that counts, so it is written after all else.
        self.work.save_state(self.folder / MOMENTS.format(index))
        self._save(LAST_FILE, index)
        (self.folder / MOMENTS.format(index - 1)).unlink(missing_ok=True)
        dice = lines[index]["dice"]["mean"]
        logger.info(
            "site %s, round %d of %d: loss %.4f, validation Dice %s",
            self.work.site.name,
            index + 1,
            self.work.federation.rounds,
            lines[index]["loss"],
            "none" if dice is None else f"{dice:.4f}",
        )

    def _load(self, path: Path) -> dict[str, str]:
        tensors, spec, extra = load_update(path)
        own = self.work.spec_whole()
        for name in ("method", "rank", "base_sha256"):
            if getattr(spec, name) != getattr(own, name):
                raise SettingsError(
                    f"{path} was made with {name} {getattr(spec, name)!r}, this run has "
                    f"{getattr(own, name)!r}; give the settings it was made with"
                )
        put_on(self.work.network, self.work.federation, path, tensors)
        return dict(extra)

    def _save(self, name: str, index: int) -> None:
        work = self.work
        extra = {"round": str(index), SETTINGS: json.dumps(work.federation.to_dict())}
        save_update(self.folder / name, work.adapter(), work.spec_whole(), extra)

    def _score(self, adapter: str, splits: tuple[str, ...]) -> dict[str, Any]:
        scores: dict[str, SiteScore] = {
            split: self.work.evaluate(split, surface_tolerance=self.surface_tolerance)
            for split in splits
        }
        values = {
            "site": self.work.site.name,
            "adapter": adapter,
            "synthetic": self.work.site.synthetic,
            "federation": self.work.federation.to_dict(),
            "base_sha256": self.work.network.base_sha256,
            **{split: score.to_dict() for split, score in scores.items()},
        }
        if self.work.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(values, indent=2) + "\n"
            write_atomic(self.folder / SCORES, text.encode())
            for split, score in scores.items():
                logger.info("site %s, %s: Dice by class %s", score.site, split, score.by_class())
        return values
