"""What all plots share: matplotlib, colours, axes in percent, and files that stay the same.

Nothing global is touched: a figure has its own canvas, and the style holds while it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_nvflare.experiments.groups import WORST, Cell, seeds_text, synthetic
from flap_nvflare.experiments.spread import Spread
from flap_nvflare.settings import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow and black, in the order of the report's lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a6a5d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # beside the colour, for prints in grey
INK, FAINT = "#222222", "#D9D9D9"
SMALL = 8.5  # points
WIDTH = 800 / 96  # inches; an SVG of matplotlib is 96 pixels an inch on a page
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "svg.fonttype": "none",  # letters as text: a small file that can be searched
    "svg.hashsalt": "flap_nvflare",  # names inside the file, which are random otherwise
}
_FORMATS = (".svg", ".png")


@dataclass(frozen=True)
class Plot:
    """A drawn figure.

    Attributes:
        figure: matplotlib's.
        title: what it shows.
        description: every number that is drawn; an SVG holds it as its description.
    """

    figure: Figure
    title: str
    description: str

    def save(self, path: Path) -> None:
        """Writes an SVG or a PNG 1600 pixels wide; the same figure gives the same bytes.

        Raises:
            ValueError: on another ending of the name.
        """
        if path.suffix not in _FORMATS:
            raise ValueError(f"{path}: plots are written as one of {_FORMATS}")
        said = {"Title": self.title, "Description": self.description}
        # None leaves out what changes from day to day and with matplotlib's version.
        unsaid = ("Date", "Creator") if path.suffix == ".svg" else ("Software",)
        metadata: dict[str, Any] = {**said, **dict.fromkeys(unsaid)}
        with style():
            self.figure.savefig(path, dpi=1600 / WIDTH, metadata=metadata)


@contextmanager
def style() -> Iterator[None]:
    """Our style while a figure is made, drawn or written.

    Raises:
        SettingsError: if matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SettingsError(
            "plots need the package matplotlib: pip install 'flap_nvflare[plots]'"
        ) from error
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a matplotlibrc of the machine says
        mpl.rcParams.update(_STYLE)  # type: ignore[arg-type]
        yield


def new_figure(height: float, note: str) -> Figure:
    """An empty figure 800 pixels wide and so many inches high; call it within `style`.

    Args:
        height: in inches.
        note: small above the plot, such as `about` gives it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(note, x=0.99, ha="right", fontsize=SMALL, color="#555555")
    return figure


def about(cells: Sequence[Cell]) -> str:
    """What a plot's means and intervals are over, and whether the scans are synthetic."""
    several = len({cell["seed"] for cell in cells}) > 1
    what = "mean and 95 % interval (Student's t) over" if several else "one run each,"
    return f"{'synthetic scans, ' if synthetic(cells) else ''}{what} {seeds_text(cells)}"


def dice_title(name: str) -> str:
    """A Dice in words: of a class, `mean` or `worst site`."""
    return {"mean": "mean Dice", WORST: "mean Dice of the worst site"}.get(name, f"{name} Dice")


def bounds(found: Spread) -> tuple[float, float]:
    """Ends of the interval in percent, within 0 and 100; of a single seed its own value twice."""
    mean, half = 100 * found.mean, 100 * (found.half or 0.0)
    return max(0.0, mean - half), min(100.0, mean + half)


def dice_limits(drawn: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Ends of an axis of Dice in percent: what is drawn with a margin, within 0 and 100."""
    low, high = min(low for low, _ in drawn), max(high for _, high in drawn)
    margin = 0.06 * (high - low) or 2.0
    return max(0.0, low - margin), min(100.0, high + margin)


def end_labels(axes: Axes, texts: Sequence[str], ends: Sequence[tuple[float, float]]) -> None:
    """Names behind the lines' ends (in data), moved up and down until they lie clear."""
    at = axes.transAxes.inverted().transform(axes.transData.transform(ends))
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # type: ignore[union-attr]
    places = spread_apart([float(y) for _, y in at], 13 / height)
    for text, end, place in zip(texts, ends, places, strict=True):
        axes.annotate(
            text,
            xy=end,
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 4},
        )


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved as little as can be (least squares) until they are `gap` apart."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    moved = np.empty(len(places))
    moved[order] = isotonic_regression(np.asarray(places)[order] - steps).x + steps
    return [float(place) for place in moved]
