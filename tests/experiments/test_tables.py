"""The table of a grid: rows, order, pairing by seed, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest
from made_up_cells import cell

from flap_nvflare.experiments.groups import gain, grouped, labels
from flap_nvflare.experiments.show import COLUMNS
from flap_nvflare.experiments.tables import curve_table, points_text, table


def rows(text: str) -> list[list[str]]:
    """Head and rows; the line below the head and the caption are left out."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[part.strip() for part in line.strip("|").split(" | ")] for line in lines]


def last_line(text: str) -> str:
    before, empty, caption = text.rsplit("\n", 2)
    assert empty == ""
    assert before.endswith("|")
    return caption


def test_dice_of_three_seeds_by_hand() -> None:
    cells = [cell(mean, seed) for seed, mean in enumerate((0.30, 0.36, 0.42))]
    head, row = rows(table(cells, ["classes", "mean", "worst site"]))
    assert head == ["trained", "kidney", "tumour", "mean", "worst site", "seeds"]
    # 4.303 x 0.06 / sqrt(3) = 0.149; the worst site is 0.1 below the mean.
    assert row == ["federated", "56.0 ± 14.9", "16.0 ± 14.9", "36.0 ± 14.9", "26.0 ± 14.9", "3"]
    assert rows(table(cells, ["mean"], spread_as="deviation"))[1][1] == "36.0 ± 6.0"


def test_rows_stand_in_the_order_of_the_cells_and_seeds_are_joined() -> None:
    points = [{"method": "full", "data.train": 4}, {"method": "flap", "data.train": 4}]
    cells = [cell(0.3, seed, varied=point) for seed in (0, 1) for point in points]
    head, first, second = rows(table(cells, ["parameters"]))
    assert head == ["method", "train", "parameters", "seeds"]
    assert first == ["full", "4", "161,584", "2"]
    assert second == ["flap", "4", "161,584", "2"]


def test_gain_is_paired_by_seed_and_values() -> None:
    together, alone = (0.50, 0.60, 0.40), (0.40, 0.52, 0.28)  # gains 0.10, 0.08, 0.12
    cells = []
    for rank, shift in ((4, 0.0), (8, 0.2)):
        for seed, (ours, own) in enumerate(zip(together, alone, strict=True)):
            cells.append(cell(ours, seed, varied={"mode": "federated", "rank": rank}))
            varied = {"mode": "alone", "rank": rank}
            cells.append(cell(own - shift, seed, mode="alone", varied=varied))
    head, *found = rows(table(cells, ["gain"]))
    assert head == ["mode", "rank", "gain", "seeds"]
    # 4.303 x 0.02 / sqrt(3) = 0.0497: far narrower than the spread of either.
    assert found == [
        ["federated", "4", "+10.0 ± 5.0", "3"],
        ["each site alone", "4", "\N{EN DASH}", "3"],
        ["federated", "8", "+30.0 ± 5.0", "3"],
        ["each site alone", "8", "\N{EN DASH}", "3"],
    ]


def test_gain_of_named_rows_is_over_the_sites_alone_with_the_same_method() -> None:
    def settings(method: str, rule: str = "svd") -> dict[str, Any]:
        return {"federation": {"method": method, "rule": rule, "rounds": 4}}

    full = cell(0.5, name="full", **settings("full"))
    alone = [
        cell(0.45, name="full alone", mode="alone", **settings("full")),
        cell(0.30, name="flap alone", mode="alone", **settings("flap")),
    ]
    assert gain(full, [full, *alone]) == pytest.approx(0.05)
    assert gain(full, [full, alone[1]]) is None
    # A rule is nothing to sites alone, so one row of them serves all.
    mean = cell(0.5, name="mean", **settings("full", "mean"))
    assert gain(mean, [mean, *alone]) == pytest.approx(0.05)
    # Of several the one with the same settings; of several none with them, nobody can say.
    again = cell(0.35, name="again", mode="alone", **settings("full", "mean"))
    assert gain(mean, [mean, *alone, again]) == pytest.approx(0.15)
    assert gain(mean, [mean, *alone, {**alone[0], "name": "again"}]) is None


def test_gain_is_over_sites_alone_with_what_matters_to_them() -> None:
    def settings(rank: int, up: list[str]) -> dict[str, Any]:
        return {"federation": {"method": "flap", "rank": rank, "upload": up}}

    alone = cell(0.3, name="alone", mode="alone", **settings(4, []))
    coded = cell(0.5, name="int8", **settings(4, ["int8"]))
    assert gain(coded, [coded, alone]) == pytest.approx(0.2)
    larger = cell(0.5, name="rank 8", **settings(8, []))
    assert gain(larger, [larger, alone]) is None
    # Where the mode is an axis the grid says who belongs together, whatever follows a mode.
    pair = [
        cell(dice, mode=mode, varied={"mode": mode}, **settings(rank, []))
        for dice, mode, rank in ((0.5, "federated", 8), (0.4, "alone", 4))
    ]
    assert gain(pair[0], pair) == pytest.approx(0.1)


def test_a_curve_says_of_which_row_it_is() -> None:
    history = [{"round": 0, "seconds": 2.0, "dice": {"mean": 0.25}}]
    cells = [cell(0.5, varied={"rank": rank}, history=history) for rank in (4, 8)]
    assert rows(curve_table([*cells, cell(0.5, varied={"rank": 2})]))[1:] == [
        ["rank 4", "1", "2.0", "25.0", "1"],
        ["rank 8", "1", "2.0", "25.0", "1"],
    ]


def test_the_envelope_is_said_by_engine() -> None:
    here, there = (cell(0.5, seed, engine=one) for seed, one in enumerate(("process", "simulator")))
    for cells, said in (
        ([here], "round, without FLARE's envelope"),
        ([there], "round, with FLARE's envelope"),
        ([here, there], "round, in the simulator with FLARE's envelope, else without"),
    ):
        assert said in last_line(table(cells, ["up"]))


def test_a_loss_has_a_minus_and_missing_partners_are_counted() -> None:
    cells = [cell(0.30, seed) for seed in (0, 1, 2)]
    cells += [cell(0.31, seed, mode="alone") for seed in (0, 1)]
    assert rows(table(cells, ["gain"]))[1][1] == "\N{MINUS SIGN}1.0 ± 0.0 (2)"


def test_next_to_nothing_has_no_minus() -> None:
    assert points_text(-0.04) == "+0.0"
    assert points_text(-0.06) == "\N{MINUS SIGN}0.1"


def test_what_is_missing_is_a_dash() -> None:
    elsewhere = {"far": {"kidney": 0.5, "mean": 0.25}, "none": {"mean": None}}
    cells = [
        cell(0.5, name="together", elsewhere=elsewhere),
        cell(0.4, name="by itself", mode="alone", parameters=None, seconds=None),
        cell(None, name="brain", mean={"brain": 0.8, "mean": 0.8}, federation={}),
    ]
    columns = ["parameters", "classes", "up", "total", "of full", "error", "seconds", "elsewhere"]
    head, *found = rows(table(cells, columns))
    assert head[:3] == ["run", "trained", "parameters"]
    assert head[-3:] == ["on far", "on none", "seeds"]
    none = "\N{EN DASH}"
    assert found[0][2:-1] == [
        "161,584", "70.0", "30.0", none, "600,000", "8.00", "12.0", "2.2 %", "41 s", "25.0", none,
    ]  # fmt: skip
    assert found[1][2:-1] == [none, "60.0", "20.0", *[none] * 8]
    assert found[2][2:-1] == [
        "161,584", none, none, "80.0", "600,000", none, "12.0", "2.2 %", "41 s", none, none,
    ]  # fmt: skip


def test_total_counts_the_sites_that_are_drawn() -> None:
    some = cell(0.5, federation={"rounds": 10, "sites_per_round": 1})
    # (600,000 + 400,000) x 1 site x 10 rounds, not the two sites there are.
    assert rows(table([some], ["total"]))[1][1] == "10.0"


def test_the_caption_says_how_it_came_about() -> None:
    cells = [cell(0.5, seed, seconds=40.0) for seed in (2, 0)]
    cells.append(cell(0.5, 1, versions={"torch": "2.12.0"}, engine="simulator", seconds=55.0))
    said = last_line(table(cells, ["mean"], command="flap-nvflare experiment ranks"))
    assert "Student's t" in said
    assert "Synthetic scans." in said
    assert "3 cells of seeds 0, 1, 2 in 2 min 15 s, engine process and simulator" in said
    assert "torch 2.13.0 and 2.12.0, python 3.12.3" in said
    assert said.endswith("Made by `flap-nvflare experiment ranks`.")
    assert "standard deviation" in last_line(table(cells, ["mean"], spread_as="deviation"))


def test_scans_of_a_folder_are_not_called_synthetic_unless_the_cell_says_so() -> None:
    assert "ynthetic" not in table([cell(0.5, data={"root": "/scans"})], ["mean"])
    marked = cell(0.5, data={"root": "/demo", "synthetic": True})
    assert "Synthetic scans." in table([marked], ["mean"])


def test_every_column_that_a_grid_may_ask_for_is_there() -> None:
    head, _ = rows(table([cell(0.5, elsewhere={"far": {"mean": 0.2}})], COLUMNS))
    assert len(head) == 2 + len(COLUMNS) + 1  # who and seeds; `classes` are two


def test_names_do_not_break_the_table() -> None:
    text = table([cell(0.5, name="a | b\nc")], ["mean"])
    assert "| a \\| b c | 50.0 | 1 |" in text


def test_wrong_calls_are_named() -> None:
    with pytest.raises(ValueError, match="nothing to show"):
        table([], ["mean"])
    with pytest.raises(ValueError, match="column 'lung' is not known"):
        table([cell(0.5)], ["lung"])
    with pytest.raises(ValueError, match="'range' is not known"):
        table([cell(0.5)], ["mean"], spread_as="range")
    with pytest.raises(ValueError, match="seed 7: leave one out"):
        table([cell(0.5, 7), cell(0.6, 7)], ["mean"])


def test_labels_are_as_short_as_they_can_be() -> None:
    named = grouped([cell(0.5, name="one"), cell(0.5, name="two", mode="alone")])
    assert labels(named) == ["one", "two"]
    varied = [{"method": "flap", "rank": rank, "rule": "svd"} for rank in (4, 8)]
    assert labels(grouped([cell(0.5, varied=one) for one in varied])) == ["rank 4", "rank 8"]
    modes = [cell(0.5, mode=mode) for mode in ("federated", "alone", "pooled")]
    assert labels(grouped(modes)) == ["federated", "each site alone", "pooled data"]
