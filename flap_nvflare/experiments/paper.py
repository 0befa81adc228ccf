"""What the paper prints: figure 1 of FLAP-SAM on Fed-KiTS, 25 rounds (arXiv 2407.21739).

The figures are read off the plot and the abstract, so they are as sure as that. The printed "GB"
are gibibits: parameters x 25 rounds x 32 / 2^30, of one client in one direction; bytes, both ways
and of all clients are other numbers. Reductions are ratios of parameters, thus of bytes as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from flap_nvflare.settings import METHODS

FEDERATION = "Fed-KiTS"


@dataclass(frozen=True)
class PaperRow:
    """One method of the figure.

    Attributes:
        method: one of `settings.METHODS`.
        dice: mean Dice in percent; None if it can't be read.
        gain: points of Dice above training alone; None if it can't be read.
        printed_gb: the figure's "GB", which are gibibits.
        reduction: how many times fewer than with full fine-tuning.
        computed: fields that are not printed but follow from the network's shapes.
        unsure: fields that were read with doubt, which no plot shows.
    """

    method: str
    dice: float | None
    gain: float | None
    printed_gb: float
    reduction: float
    computed: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not known; expected one of {METHODS}")
        for name in (*self.computed, *self.unsure):
            if getattr(self, name, None) is None:
                raise ValueError(f"{self.method}: field {name!r} has no value to be in doubt of")

    @property
    def sure_dice(self) -> float | None:
        """The Dice, unless there is doubt."""
        return None if "dice" in self.unsure else self.dice

    @property
    def sure_gain(self) -> float | None:
        """The gain, unless there is doubt."""
        return None if "gain" in self.unsure else self.gain


# The Dice of `full` lies somewhere from 54 to 55, which is no number to hold anything against.
PAPER = (
    PaperRow("full", None, None, 67.45, 1.0, computed=("printed_gb", "reduction")),
    PaperRow("attention", None, 8.86, 23.60, 2.8, unsure=("gain",)),
    PaperRow("decoder", 50.70, 8.55, 2.91, 23.2),
    PaperRow("partial_decoder", 45.40, 7.72, 0.36, 187.4),
    PaperRow("lora", 36.90, -0.30, 1.02, 66.1, unsure=("gain",)),
    PaperRow("lora_decoder", 59.80, 9.34, 3.93, 17.2),
    PaperRow("flap", 60.50, 9.77, 1.38, 48.9),
)
