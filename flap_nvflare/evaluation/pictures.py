"""Scan, truth and prediction side by side, of the cases that went worst."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from flap_nvflare.data.panels import draw_panels
from flap_nvflare.data.planes import LARGEST, square
from flap_nvflare.data.volume import load_volume
from flap_nvflare.training.scores import CaseScore
from flap_nvflare.training.work import SiteWork

if TYPE_CHECKING:
    from flap_nvflare.data.prepared import Prepared

FOLDER = "pictures"


@dataclass(frozen=True)
class Picture:
    """One file.

    Attributes:
        file: its path below the evaluation's folder.
        site, case, model: whose scan, and whose prediction.
        slice: which slice, the one nearest to the head being 1.
    """

    file: str
    site: str
    case: str
    slice: int
    model: str

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds."""
        return asdict(self)


class Pictures:
    """Looks at every case of a site, then draws those with the lowest Dice.

    Of each case the slice with the most foreground, drawn or predicted, is shown; only that one
    is kept until then.

    Args:
        folder: the evaluation's folder.
        count: cases to draw of each site.
        class_names: of the foreground classes, from class 1.
    """

    def __init__(self, folder: Path, count: int, class_names: tuple[str, ...]) -> None:
        self.folder = folder
        self.count = count
        self.class_names = class_names
        self._seen: list[tuple[float, str, int, np.ndarray]] = []

    def look(self, volume: Prepared, mask: Tensor, score: CaseScore) -> None:
        """Takes in a case, the class indices (S, H, W) predicted, and their score."""
        if not self.count:
            return
        known = [dice for dice in score.dice if dice is not None]
        dice = sum(known) / len(known) if known else 1.0
        shown = ((mask > 0) | (volume.native_label() > 0)).sum(dim=(1, 2))
        index = int(shown.argmax())
        # A copy: a view of it would keep the whole mask of every case in memory.
        self._seen.append((dice, volume.name, index, mask[index].numpy().copy()))

    def draw(self, work: SiteWork, split: str, model: str) -> list[Picture]:
        """Draws what was seen of the site, and forgets it.

        Raises:
            OSError: if a file cannot be written.
        """
        worst = sorted(self._seen, key=lambda seen: seen[:2])[: self.count]
        self._seen = []
        cases = {case.name: case for case in getattr(work.cases, split)}
        site, drawn = work.site.name, []
        for _, name, index, predicted in worst:
            volume = load_volume(cases[name], work.federation.classes)
            grey = work.data.window_of(site, volume).shown(volume.image[index])
            planes = [
                square(plane, volume.spacing[1:], LARGEST)
                for plane in (grey, volume.label[index], predicted)
            ]
            number = index + 1
            picture = Picture(f"{FOLDER}/{site}_{name}_{number}.png", site, name, number, model)
            path = self.folder / picture.file
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_panels(
                path,
                [
                    (f"{site}, {name}, slice {number} of {len(volume.label)}", planes[0], None),
                    ("truth", planes[0], planes[1]),
                    (f"prediction: {model}", planes[0], planes[2]),
                ],
                self.class_names,
            )
            drawn.append(picture)
        return drawn
