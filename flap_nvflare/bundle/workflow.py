"""A site's work as a federation asks for it: the bundle's training config, built from settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_nvflare.settings import Federation, Site

if TYPE_CHECKING:
    from flap_nvflare.training.work import SiteWork

CONFIGS = Path(__file__).parent / "configs"
TRAIN_CONFIG = CONFIGS / "train.yaml"
MULTI_GPU_CONFIG = CONFIGS / "multi_gpu_train.yaml"
METADATA = CONFIGS / "metadata.json"


def build_work(
    federation: Federation, site: Site, configs: Sequence[Path] = (TRAIN_CONFIG,)
) -> SiteWork:
    """The site's parts from the training config, to train and score round by round.

    The settings enter the parsed config as finished objects. None of their text passes
    through MONAI's parser, which would run a value that starts with `$` as Python.

    Builds the network and reads no scan. Training cases are prepared at the first `train`, a
    split's cases at its first `evaluate`; both stay in memory and in the site's cache.

    Args:
        federation: what all sites agree on.
        site: the site's disk. A name like `A+B` pools sites (the baseline without privacy).
        configs: files of this package, each laid over those before it; with `MULTI_GPU_CONFIG`
            last, the parts of one of several processes started by torchrun.

    Raises:
        SettingsError: if the base model is missing or is not the one the site accepts.
        CheckpointError, ValueError: as a part raises them, without MONAI's wrapping.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(config) for config in configs])
    parser["federation"] = federation
    parser["hospital"] = site
    try:
        work: SiteWork = parser.get_parsed_content("work")
    except RuntimeError as error:
        raise innermost(error) from None
    return work


def innermost(error: BaseException) -> BaseException:
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
