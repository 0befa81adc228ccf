"""What an evaluation found: one score a case, and their summary for the site. Plain data.

The convention, stated once: a case in which a class is neither present nor predicted says
nothing about the class. Its Dice is left out (None) and counted; one mask empty is 0. The
paper counts both empty as 1: that figure stands in a second column. A site's Dice is the
mean over its cases for each class, then the mean of the classes.

FLamby's Fed-KiTS2019 has a third convention (flamby/datasets/fed_kits19/metric.py): the Dice of
kidney and tumour together (any label above 0) and of the tumour, 1e-5 added to the denominator, so
that both empty is 0, and the mean of the two. FLamby takes it over batches of random patches of
scans that nnU-Net has resampled; here it is taken over each whole volume at native resolution. The
formula is theirs, the numbers of their benchmark are not to be compared. With other classes the
first is likewise scored on all foreground, the others by themselves; FLamby says nothing of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Figures = tuple[float | None, ...]
ON_REQUEST = ("nsd", "hd95", "dice_flamby")
FIGURES = ("dice", "dice_paper", *ON_REQUEST)


@dataclass(frozen=True)
class CaseScore:
    """One case; every tuple has one figure a class, in the order of the class names.

    Attributes:
        case: the case's name.
        dice: hard Dice, None where the class is neither present nor predicted.
        dice_paper: the same with 1 in place of None.
        nsd: normalised surface Dice; empty if not asked for.
        hd95: 95th percentile of the surface distance in mm, None where either mask is
            empty; the tuple is empty if not asked for.
        dice_flamby: Dice as FLamby's Fed-KiTS2019 has it; empty if not asked for.
    """

    case: str
    dice: Figures
    dice_paper: tuple[float, ...]
    nsd: Figures = ()
    hd95: Figures = ()
    dice_flamby: Figures = ()

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds; no figure is NaN."""
        values: dict[str, Any] = {
            "case": self.case,
            "dice": list(self.dice),
            "dice_paper": list(self.dice_paper),
        }
        for name in ON_REQUEST:
            if getattr(self, name):
                values[name] = list(getattr(self, name))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CaseScore:
        """Reads back `to_dict`."""
        figures = {name: tuple(values.get(name, ())) for name in FIGURES}
        return cls(case=str(values["case"]), **figures)


@dataclass(frozen=True)
class SiteScore:
    """All cases of one split of one site.

    Attributes:
        site: the site's name.
        split: `validation` or `test`.
        class_names: foreground classes in label order.
        cases: the scores of the cases, in the order of the split.
        seconds: how long the evaluation took, without reading the scans.
    """

    site: str
    split: str
    class_names: tuple[str, ...]
    cases: tuple[CaseScore, ...]
    seconds: float = 0.0

    def by_class(self, figure: str = "dice") -> dict[str, float | None]:
        """Mean over the cases for each class; None where no case has the figure.

        Args:
            figure: one of `FIGURES`.
        """
        return {
            name: _mean(getattr(case, figure)[i] for case in self.cases if getattr(case, figure))
            for i, name in enumerate(self.class_names)
        }

    def numbered(self) -> SiteScore:
        """The same with the cases numbered from 1: no name of a case leaves a site."""
        cases = tuple(
            replace(case, case=str(number)) for number, case in enumerate(self.cases, start=1)
        )
        return replace(self, cases=cases)

    @property
    def dice(self) -> float | None:
        """Mean over the classes of the mean Dice over the cases; None without any figure."""
        return _mean(self.by_class().values())

    @property
    def dice_paper(self) -> float | None:
        """The same where both masks empty count as 1."""
        return _mean(self.by_class("dice_paper").values())

    @property
    def left_out(self) -> dict[str, int]:
        """How many cases say nothing about each class."""
        return {
            name: sum(case.dice[i] is None for case in self.cases)
            for i, name in enumerate(self.class_names)
        }

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds: the summary, then the cases.

        Each figure is a dictionary by class with the mean of the classes as `mean`.
        """
        values: dict[str, Any] = {
            "site": self.site,
            "split": self.split,
            "class_names": list(self.class_names),
            "dice": {**self.by_class(), "mean": self.dice},
            "dice_paper": {**self.by_class("dice_paper"), "mean": self.dice_paper},
            "left_out": self.left_out,
            "seconds": self.seconds,
        }
        for name in ON_REQUEST:
            if any(getattr(case, name) for case in self.cases):
                figures = self.by_class(name)
                values[name] = {**figures, "mean": _mean(figures.values())}
        values["cases"] = [case.to_dict() for case in self.cases]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiteScore:
        """Reads back `to_dict`; the summary is worked out anew from the cases."""
        return cls(
            site=str(values["site"]),
            split=str(values["split"]),
            class_names=tuple(values["class_names"]),
            cases=tuple(CaseScore.from_dict(case) for case in values["cases"]),
            seconds=float(values.get("seconds", 0.0)),
        )


def _mean(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known else None
