"""Plots of a grid: what is drawn where, that every number is in the file, that files stay."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from made_up_cells import WIRE, cell

from flap_nvflare.experiments import plots, show
from flap_nvflare.experiments.drawing import spread_apart
from flap_nvflare.experiments.lines import powers
from flap_nvflare.experiments.paper import PAPER
from flap_nvflare.experiments.plots import Plot, bars, figure_one, lines, matrix
from flap_nvflare.settings import SettingsError

Cells = list[dict[str, Any]]
ELSEWHERE = {"far": {"mean": 0.125}, "near": {"mean": 0.375}}


def sizes() -> Cells:
    """Three seeds at three sizes by two methods: means 0.3 + 0.1 for `flap` + 0.01 a size."""
    return [
        cell(
            0.3 + 0.1 * (method == "flap") + 0.01 * place + 0.02 * (seed - 1),
            seed,
            varied={"data.train": size, "method": method},
            federation={"method": method},
            elsewhere=ELSEWHERE,
        )
        for seed in range(3)
        for method in ("flap", "full")
        for place, size in enumerate((4, 8, 16))
    ]


DRAWN: dict[str, Callable[[Cells], Plot]] = {
    "lines": lambda cells: lines(cells, "data.train", "method"),
    "bars": lambda cells: bars(cells, of=["mean", "tumour"]),
    "matrix": matrix,
    "figure_one": figure_one,
}


def axes_of(plot: Plot, place: int = 0) -> Any:
    return plot.figure.axes[place]


def texts(path: Path) -> str:
    """What a reader finds in an SVG: its texts and its description."""
    svg = path.read_text(encoding="utf-8")
    return " | ".join(re.findall(r"<(?:text|dc:description)[^>]*>([^<]*)<", svg))


@pytest.mark.parametrize("kind", DRAWN)
def test_every_number_is_in_the_file_which_is_always_the_same(kind: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("one.svg", "two.svg"):
        DRAWN[kind](sizes()).save(tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert dict(matplotlib.rcParams) == before  # nothing of a user's own plots changes
    said = texts(tmp_path / "one.svg")
    # 4.303 x 0.02 / sqrt(3) = 0.0497 around each mean.
    for mean in (40, 41, 42, 30, 31, 32):
        assert f"{mean}.0 ± 5.0" in said
    assert "synthetic scans" in said
    if kind == "matrix":
        assert said.count("12.5 ± 0.0") == said.count("37.5 ± 0.0") == 2 * 6  # seen and described
    if kind == "bars":
        assert "22.0 ± 5.0" in said  # the tumours


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_style_of_the_machine_does_not_matter(ending: str, tmp_path: Path) -> None:
    one, two = (tmp_path / f"{name}{ending}" for name in ("one", "two"))
    bars(sizes()).save(one)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.hashsalt": None}):
        bars(sizes()).save(two)
    assert one.read_bytes() == two.read_bytes()


def test_lines_and_shades_lie_where_the_figures_are() -> None:
    plot = lines(sizes(), "data.train", "method", x_title="training cases")
    axes = axes_of(plot)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training cases", "mean Dice, %")
    assert axes.get_xscale() == "log"
    flap, full = axes.lines
    assert flap.get_xydata() == pytest.approx(np.array([[4, 40], [8, 41], [16, 42]]))
    assert full.get_ydata() == pytest.approx(np.array([30, 31, 32]))
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    half = 4.302653 * 2 / 3**0.5
    assert (heights.min(), heights.max()) == pytest.approx((40 - half, 42 + half))
    assert [text.get_text() for text in axes.texts] == ["flap", "full"]


def test_modes_of_one_value_share_its_colour_and_differ_in_their_dashes() -> None:
    cells = [
        cell(0.3 + 0.1 * place, mode=mode, varied={"rank": rank, "method": "flap"})
        for place, mode in enumerate(("alone", "federated", "pooled"))
        for rank in (4, 8)
    ]
    cells += [cell(0.2, varied={"rank": rank, "method": "full"}) for rank in (4, 8)]
    drawn = axes_of(lines(cells, "rank", "method"))
    assert [text.get_text() for text in drawn.texts] == [
        "flap, each site alone", "flap", "flap, pooled data", "full",
    ]  # fmt: skip
    colours = [line.get_color() for line in drawn.lines]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    assert [line.get_linestyle() for line in drawn.lines] == [":", "-", "--", "-"]
    assert drawn.get_xscale() == "linear"


def test_lines_of_numbers_say_of_what() -> None:
    cells = [cell(0.4, varied={"rule": "svd", "data.sites": sites}) for sites in (3, 6)]
    shown = [text.get_text() for text in axes_of(lines(cells, "rule", "data.sites")).texts]
    assert shown == ["sites 3", "sites 6"]


def test_names_stand_in_the_order_of_the_cells_and_missing_points_are_left_out() -> None:
    values = {"tail": 0.3, "mean": None, "svd": 0.4}
    cells = [cell(middle, varied={"rule": rule}) for rule, middle in values.items()]
    axes = axes_of(lines(cells, "rule"))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["tail", "mean", "svd"]
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([[0, 30], [2, 40]]))


def test_powers() -> None:
    assert powers([4, 8, 32])
    assert powers([0.01, 0.1, 1])
    assert powers([3, 6, 12])
    assert not powers([0, 1, 2, 4])
    assert not powers([1, 2, 3])
    assert not powers([1, 1000])
    assert not powers([-1, -2, -4])


def test_bars_have_the_rows_length_and_their_figure() -> None:
    cells = [cell(mean, seed, name="together") for seed, mean in enumerate((0.30, 0.36, 0.42))]
    cells += [cell(0.25, name="by itself", mode="alone"), cell(None, name="lost")]
    axes = axes_of(bars(cells))
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "together", "by itself", "lost",
    ]  # fmt: skip
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([36, 25])
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["36.0 ± 14.9", "25.0", "\N{EN DASH}"]
    assert axes.get_xlim()[0] == 0
    low, high = axes.collections[0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((36 - 14.905, 36 + 14.905), abs=1e-3)


def test_an_interval_ends_where_dice_ends() -> None:
    cells = [cell(middle, seed, name="two") for seed, middle in enumerate((0.5, 0.9))]
    low, high = axes_of(bars(cells)).collections[0].get_segments()[0][:, 0]
    assert (low, high) == (0, 100)  # 12.7 x 0.28 / sqrt(2) is 2.5


def test_matrix_shows_what_is_not_known_as_such() -> None:
    cells = [
        cell(0.95, varied={"data.kind": "kits"}, elsewhere={"mr": {"mean": 0.05}}),
        cell(0.5, varied={"data.kind": "mr"}, elsewhere={"ct": {"mean": None}}),
    ]
    axes = axes_of(matrix(cells))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["own sites", "mr", "ct"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["kits", "mr"]
    none = "\N{EN DASH}"
    assert [text.get_text() for text in axes.texts] == ["95.0", "5.0", none, "50.0", none, none]
    # Black on light and white on dark.
    assert [text.get_color()[0] for text in axes.texts[:2]] == [0, 1]


def points_of(axes: Any) -> dict[tuple[float, float], str]:
    """The gain that stands at each point (reduction, Dice)."""
    return {
        (round(text.xy[0], 1), round(text.xy[1], 1)): text.get_text()
        for text in axes.texts
        if hasattr(text, "xy")
    }


def test_figure_one_shows_the_paper_beside_ours() -> None:
    cells = []
    for method, middle, down in (("full", 0.50, 6_000_000), ("flap", 0.40, 0)):
        wire = {**WIRE, "up": down or 200_000, "down": down or 400_000}
        federation = {"method": method}
        for seed in range(3):
            shared: dict[str, Any] = {"varied": {"method": method}, "federation": federation}
            cells.append(cell(middle + 0.01 * seed, seed, wire=wire, **shared))
            cells.append(cell(middle - 0.08, seed, mode="alone", **shared))
    cells.append(cell(None, varied={"method": "lora"}, federation={"method": "lora"}))
    plot = figure_one(cells)
    paper, ours = axes_of(plot, 0), axes_of(plot, 1)
    assert points_of(ours) == {(1.0, 51.0): "+9.0", (20.0, 41.0): "+9.0"}
    assert points_of(paper) == {
        (23.2, 50.7): "+8.6",
        (187.4, 45.4): "+7.7",
        (66.1, 36.9): "gain ?",
        (17.2, 59.8): "+9.3",
        (48.9, 60.5): "+9.8",
    }
    assert paper.get_xscale() == ours.get_xscale() == "log"
    notes = [text.get_text() for axes in (paper, ours) for text in axes.texts]
    assert "not known: full, attention" in notes
    assert "not known: LoRA" in notes
    legend = plot.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()][-1].startswith("FLAP-SAM")
    assert "54" not in plot.description  # a Dice in doubt is not shown
    assert plot.description.count("gain not known") == 1


def test_a_method_looks_the_same_in_every_panel_and_gains_cover_no_point() -> None:
    cells = [
        cell(
            (row.dice or 55.0) / 100,
            varied={"data.kind": kind, "method": row.method},
            federation={"method": row.method},
            wire={**WIRE, "up": 6e6 / row.reduction, "down": 6e6 / row.reduction},
        )
        for kind in ("kits", "prostate")
        for row in PAPER
    ]
    plot = figure_one(cells)
    paper, first, second, free = plot.figure.axes
    looks = [
        {line.get_color(): line.get_marker() for line in axes.lines} for axes in (first, second)
    ]
    assert looks[0] == looks[1]
    assert len(looks[0]) == len(set(looks[0].values())) == len(PAPER)
    assert {line.get_color() for line in paper.lines} < set(looks[0])
    assert free.get_legend() is not None  # in the panel that is left over
    centres = [
        axes.transData.transform(line.get_xydata()[0]) for axes in (first,) for line in axes.lines
    ]
    boxes = [text.get_window_extent() for text in first.texts]
    assert not any(box.contains(*centre) for box in boxes for centre in centres)
    assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)


def test_federations_have_panels() -> None:
    plot = figure_one(sizes(), by="data.train")
    titles = [axes.get_title(loc="left") for axes in plot.figure.axes]
    assert titles == ["Fed-KiTS, as the paper prints it", "4", "8", "16"]
    assert len(figure_one(sizes()).figure.axes) == 2


@pytest.mark.parametrize("kind", DRAWN)
def test_a_single_cell_is_enough(kind: str, tmp_path: Path) -> None:
    one = sizes()[0]
    DRAWN[kind]([one]).save(tmp_path / "one.svg")
    said = texts(tmp_path / "one.svg")
    assert "38.0" in said
    assert "±" not in said
    assert "one run each, seed 0" in said


@pytest.mark.parametrize("kind", DRAWN)
def test_nothing_to_draw_is_said(kind: str) -> None:
    with pytest.raises(ValueError, match="nothing to"):
        DRAWN[kind]([])
    unknown = cell(None, varied={"data.train": 4, "method": "flap"})
    with pytest.raises(ValueError, match=r"nothing to draw|no cell was scored"):
        DRAWN[kind]([unknown])


def test_plots_take_what_a_grid_may_tell_them() -> None:
    for kind, options in show.PLOTS.items():
        known = inspect.signature(getattr(plots, kind)).parameters
        assert set(options) <= set(known), kind


def test_wrong_calls_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no axis 'size'"):
        lines(sizes(), "size")
    with pytest.raises(ValueError, match="two points of the line 'flap'"):
        lines(
            [*sizes(), cell(0.5, 9, name="b", varied=sizes()[0]["varied"])], "data.train", "method"
        )
    with pytest.raises(ValueError, match=r"plots are written as"):
        bars(sizes()).save(tmp_path / "one.bmp")


def test_without_matplotlib_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for drawn in DRAWN.values():
        with pytest.raises(SettingsError, match=r"pip install 'flap_nvflare\[plots\]'"):
            drawn(sizes())


def test_labels_move_apart_no_more_than_they_must() -> None:
    assert spread_apart([0.1, 0.5], 0.1) == pytest.approx([0.1, 0.5])
    # Two on one place move half of the gap each way, whatever their order.
    assert spread_apart([0.5, 0.9, 0.5], 0.1) == pytest.approx([0.45, 0.9, 0.55])
    # A heap stays around its middle, 0.45.
    assert spread_apart([0.4, 0.45, 0.5], 0.1) == pytest.approx([0.35, 0.45, 0.55])
