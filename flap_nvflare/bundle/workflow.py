"""A site's workflow as a federation sees it: the bundle's training config behind plain calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.schedule import never

if TYPE_CHECKING:
    import torch

    from flap_nvflare.adapter.update import UpdateSpec
    from flap_nvflare.data.kits import SiteCases
    from flap_nvflare.sam.segmenter import Segmenter
    from flap_nvflare.training.scores import SiteScore
    from flap_nvflare.training.work import Progress, SiteWork, TrainReport

CONFIGS = Path(__file__).parent / "configs"
TRAIN_CONFIG = CONFIGS / "train.yaml"
METADATA = CONFIGS / "metadata.json"


class SiteWorkflow:
    """Wraps `configs/train.yaml`; trains and scores a site round by round.

    The settings enter the parsed config as finished objects. None of their text passes
    through MONAI's parser, which would run a value that starts with `$` as Python.

    Making one builds the network and reads no scan. Training cases are read at the first
    `train`, a split's cases at its first `evaluate`; both stay in memory.

    Args:
        federation: what all sites agree on.
        site: the site's disk. A name like `A+B` pools sites (the baseline without privacy).

    Raises:
        SettingsError: if the base model is missing or is not the one the site accepts.

    Attributes:
        federation: as given.
        site: as given.
        network: the segmenter.
        work: the site's parts as built from the config.
    """

    def __init__(self, federation: Federation, site: Site) -> None:
        self.federation = federation
        self.site = site
        self.work = build_work(federation, site)
        self.network: Segmenter = self.work.network

    @property
    def cases(self) -> SiteCases:
        """The site's cases by split; reads no scan."""
        return self.work.cases

    def adapter(self) -> dict[str, torch.Tensor]:
        """Copies of the travelling tensors on the CPU in float32, sorted by name."""
        return self.work.adapter()

    def load_adapter(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts `tensors` in place; ValueError if names or shapes differ."""
        self.work.load_adapter(tensors)

    def spec(self) -> UpdateSpec:
        """What a travelling update of this site must look like."""
        return self.work.spec()

    def train(
        self,
        round_index: int,
        should_stop: Callable[[], bool] = never,
        progress: Progress | None = None,
    ) -> TrainReport:
        """Trains one round; see `SiteWork.train`."""
        return self.work.train(round_index, should_stop, progress)

    def evaluate(
        self,
        split: str,
        should_stop: Callable[[], bool] = never,
        surface_tolerance: float | None = None,
    ) -> SiteScore:
        """Scores one split; see `SiteWork.evaluate`."""
        return self.work.evaluate(split, should_stop, surface_tolerance)

    def save_state(self, path: Path | str) -> None:
        """Writes the optimiser's moments, whole or not at all."""
        self.work.save_state(path)

    def load_state(self, path: Path | str, reset_factors: bool) -> None:
        """Reads the optimiser's moments; StateError if they do not fit.

        Args:
            path: file of `save_state`.
            reset_factors: drop the moments of the low-rank factors, whose basis has turned.
        """
        self.work.load_state(path, reset_factors)

    def reset_state(self) -> None:
        """Forgets all moments: for a run's first round, or one that goes on without a file."""
        self.work.reset_state()


def build_work(federation: Federation, site: Site) -> SiteWork:
    """The site's parts from the bundle's training config.

    Raises:
        Whatever a part raises when made, itself and not MONAI's wrapping of it.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(TRAIN_CONFIG))
    parser["federation"] = federation
    parser["hospital"] = site
    try:
        work: SiteWork = parser.get_parsed_content("work")
    except RuntimeError as error:
        raise _innermost(error) from None
    return work


def _innermost(error: BaseException) -> BaseException:
    """The error that MONAI's parser met, under its RuntimeErrors about the config item."""
    while error.__cause__ is not None and str(error).startswith("Failed to "):
        error = error.__cause__
    return error


def config_values() -> dict[str, Any]:
    """The training config as written, for tools that show or check it."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(TRAIN_CONFIG))
    values: dict[str, Any] = parser.get()
    return values
