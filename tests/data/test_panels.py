"""Panels as their pixels say: grey, colour of class and border, legend, the owner's alone."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

from flap_nvflare.data.panels import draw_panels
from flap_nvflare.data.planes import COLOURS, square

NAMES = ["kidney", "tumour"]
TOP, LEFT = 24, 8  # of the first panel


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def drawn(tmp_path: Path, mask: np.ndarray | None, grey: float = 0.5) -> np.ndarray:
    plane = np.full((400, 400), grey)
    return pixels(draw_panels(tmp_path / "a.png", [("scan", plane, mask)], NAMES))


def holds(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour, np.uint8)).all(axis=2).any())


def test_a_class_is_tinted_and_outlined_and_all_else_stays_grey(tmp_path: Path) -> None:
    mask = np.zeros((400, 400), np.uint8)
    mask[100:200, 50:150] = 2
    plain = drawn(tmp_path, None)[TOP : TOP + 400, LEFT : LEFT + 400]
    marked = drawn(tmp_path, mask)[TOP : TOP + 400, LEFT : LEFT + 400]
    assert (plain == 127).all()
    assert np.array_equal(marked[mask == 0], plain[mask == 0])
    assert (marked[100, 50:150] == COLOURS[1]).all()
    assert (marked[100:200, 149] == COLOURS[1]).all()
    inside = marked[150, 100].astype(float)
    assert inside == pytest.approx(0.55 * 127.5 + 0.45 * np.array(COLOURS[1]), abs=1)


def test_the_legend_shows_each_class_where_there_is_a_mask(tmp_path: Path) -> None:
    below = slice(TOP + 400, None)
    with_mask = drawn(tmp_path, np.zeros((400, 400), np.uint8))
    assert all(holds(with_mask[below], colour) for colour in COLOURS[:2])
    assert not holds(with_mask[below], COLOURS[2])
    without = drawn(tmp_path, None)
    assert not any(holds(without, colour) for colour in COLOURS)
    assert len(with_mask) > len(without)


def test_panels_stand_side_by_side_and_small_ones_are_enlarged(tmp_path: Path) -> None:
    left, right = np.zeros((40, 30)), np.ones((100, 400))
    picture = pixels(draw_panels(tmp_path / "a.png", [("a", left, None), ("b", right, None)], []))
    assert (picture[TOP : TOP + 320, LEFT : LEFT + 240] == 0).all()
    start = LEFT + 240 + 8
    assert picture.shape[1] == start + 400 + 8
    assert (picture[TOP : TOP + 100, start : start + 400] == 255).all()


def test_many_and_long_names_take_more_lines_and_no_more_width(tmp_path: Path) -> None:
    plane, mask = np.zeros((320, 320)), np.zeros((320, 320), np.uint8)
    names = ["a class\nof a name " + "x" * 300, *(f"class {k}" for k in range(12))]
    picture = pixels(draw_panels(tmp_path / "a.png", [("t" * 500, plane, mask)], names))
    assert picture.shape[1] == 320 + 2 * 8
    assert len(picture) > TOP + 320 + 3 * 24


def test_a_title_is_written_above_its_panel(tmp_path: Path) -> None:
    plane = np.ones((320, 320))
    bare = pixels(draw_panels(tmp_path / "a.png", [("", plane, None)], []))
    titled = pixels(draw_panels(tmp_path / "b.png", [("slice 112", plane, None)], []))
    assert (bare[:TOP] == 255).all()
    assert (titled[:TOP] < 128).any()


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("an old one")
    (tmp_path / "a.png").chmod(0o644)
    drawn(tmp_path, None)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o600


def test_a_full_disk_leaves_no_half_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn(tmp_path, None)
    before = (tmp_path / "a.png").read_bytes()

    def full(image: object, file: IO[bytes], *options: object, **more: object) -> None:
        file.write(b"a part")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        drawn(tmp_path, None, grey=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_what_is_no_plane_is_refused(tmp_path: Path) -> None:
    plane = np.zeros((4, 5))
    for panels, match in (
        ([], "no panel"),
        ([("a", np.zeros((2, 4, 5)), None)], r"'a': grey values have shape \(2, 4, 5\)"),
        ([("a", plane, np.zeros((5, 4), np.uint8))], r"mask \(5, 4\)"),
        ([("a", np.zeros((0, 5)), None)], r"shape \(0, 5\)"),
    ):
        with pytest.raises(ValueError, match=match):
            draw_panels(tmp_path / "a.png", panels, NAMES)
    assert not (tmp_path / "a.png").exists()


def test_pixels_are_square_in_mm() -> None:
    assert square(np.zeros((10, 20)), (2.0, 1.0), 512).shape == (20, 20)
    assert square(np.zeros((1000, 500)), (1.0, 1.0), 512).shape == (512, 256)
