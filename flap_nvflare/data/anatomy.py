"""The synthetic abdomen around the kidneys: body wall, spine, liver, spleen, bowel, vessels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flap_nvflare.data.canvas import Canvas, Point, rotation


@dataclass(frozen=True)
class Phase:
    """HU of the tissues that contrast medium changes.

    `pelvis` is the urine in the collecting system of the kidney; `tumour` holds the HU of clear
    cell, papillary and chromophobe tumours.
    """

    cortex: float
    medulla: float
    pelvis: float
    artery: float
    vein: float
    liver: float
    spleen: float
    tumour: tuple[float, float, float]

    def diluted(self, share: float) -> Phase:
        """The phase with `share` of its contrast over the scan without contrast medium."""
        plain = PHASES["none"]
        values = {
            name: getattr(plain, name) + share * (getattr(self, name) - getattr(plain, name))
            for name in ("cortex", "medulla", "pelvis", "artery", "vein", "liver", "spleen")
        }
        tumour = tuple(
            dry + share * (wet - dry) for dry, wet in zip(plain.tumour, self.tumour, strict=True)
        )
        return Phase(**values, tumour=(tumour[0], tumour[1], tumour[2]))


PHASES = {
    "none": Phase(36, 31, 8, 42, 40, 56, 47, (34, 40, 37)),
    "arterial": Phase(178, 88, 10, 290, 95, 72, 118, (138, 62, 92)),
    "venous": Phase(172, 150, 12, 155, 150, 112, 122, (104, 78, 94)),
    "late": Phase(118, 112, 320, 105, 104, 92, 96, (76, 68, 74)),
}
# HU of no scan, by which tissues can be told apart where another modality is made of them.
TELLING = Phase(118, 92, 12, 26, 26, 145, 72, (75, 55, 100))


@dataclass(frozen=True)
class Build:
    """Measures of one patient, in mm.

    Attributes:
        width, depth: half axes of the body.
        fat: thickness of the fat under the skin.
        spine: (y, x) of the vertebral bodies.
    """

    width: float
    depth: float
    fat: float
    spine: tuple[float, float]


def paint_body(canvas: Canvas, field_of_view: float) -> Build:
    """Air, table, skin, fat, muscle wall with ribs, mesenteric fat."""
    rng = canvas.rng
    width = float(min(rng.uniform(138, 172), 0.46 * field_of_view))
    depth = float(width * rng.uniform(0.66, 0.8))
    fat = float(rng.uniform(5, 30))
    x, y, z = canvas.x, canvas.y, canvas.z
    power = np.float32(rng.uniform(2.0, 2.5))
    radius = np.sqrt(x * x + y * y)
    norm = (np.abs(x / width) ** power + np.abs(y / depth) ** power) ** (1 / power)
    inside = radius * (1 / np.maximum(norm, 1e-3) - 1)  # mm below the skin
    layer = fat * (1 + 0.35 * np.abs(x) / width + 0.25 * y / depth) + 1.5 * canvas.rough
    wall = float(rng.uniform(8, 15)) + 1.5 * canvas.rough
    ribs = np.sin(
        z * np.float32(2 * np.pi / rng.uniform(26, 32))
        + np.abs(x) * np.float32(rng.uniform(0.05, 0.09))
        + np.float32(rng.uniform(0, 6))
    )
    canvas.hu[inside > 0] = -104
    canvas.hu += np.where(inside > 0, 5 * canvas.rough, 0)
    strands = np.abs(canvas.noise((9, 22, 22), 1.0)) < 0.05
    canvas.hu[(inside > layer + wall) & strands] = -30
    canvas.hu[(inside > 0) & (inside < 2.2)] = 10
    in_wall = (inside > layer) & (inside < layer + wall)
    canvas.hu[in_wall] = rng.uniform(45, 62)
    seam = in_wall & (np.abs(x) < 4) & (y < 0)
    canvas.hu[seam] = -60
    middle = np.abs(inside - layer - wall * 0.55)
    side = (np.abs(x) > 0.45 * width) & (z < rng.uniform(-10, 60))
    bone = side & (middle < 4.5) & (ribs > 0.72)
    canvas.hu[bone] = 180
    canvas.hu[bone & ((middle > 2.5) | (ribs < 0.8))] = 420
    flat_y = (np.arange(canvas.shape[1]) - (canvas.shape[1] - 1) / 2) * canvas.spacing[1]
    table = np.abs(flat_y - (depth + 14)) < 2.5
    canvas.hu[:, table, :] = np.maximum(canvas.hu[:, table, :], -250)
    canvas.room = inside > layer + wall - 1
    return Build(width, depth, fat, (depth * rng.uniform(0.36, 0.43), rng.uniform(-6, 6)))


def paint_spine(canvas: Canvas, build: Build) -> None:
    """Vertebrae with bright cortex and darker marrow, discs, canal, processes, muscles."""
    rng = canvas.rng
    y0, x0 = build.spine
    curve = rng.uniform(-8, 8)
    z = canvas.z
    y = canvas.y - np.float32(y0) - 6 * np.cos(z * np.float32(np.pi / 160))
    x = canvas.x - np.float32(x0) - np.float32(curve) * np.sin(z * np.float32(np.pi / 140))
    size = rng.uniform(0.9, 1.12)
    inside = canvas.hu > -200
    for side in (-1, 1):
        back = np.sqrt(((y - 38) / 17) ** 2 + ((x - side * 32) / 24) ** 2) + 0.08 * canvas.rough
        canvas.hu[(back < 1) & inside] = 52
        psoas = rng.uniform(12, 20)
        grow = psoas * (0.55 + 0.45 * np.tanh((z + 20) / 50))
        near = ((y - 2) ** 2 + (x - side * (20 * size + grow)) ** 2) / grow**2
        canvas.hu[near < 1 + 0.15 * canvas.rough] = 58
    body = np.sqrt((y / (16 * size)) ** 2 + (x / (21 * size)) ** 2) + 0.03 * canvas.rough
    period, start = rng.uniform(32, 38), rng.uniform(0, 38)
    level = np.abs(((z + start) % np.float32(period)) - period / 2)
    disc = level > period / 2 - 4
    marrow = rng.uniform(120, 240) + 18 * canvas.rough
    arch = (np.abs(x) < 5 * size) & (y > 30) & (y < 58 * size) & (level < 10)
    wings = (np.abs(y - 22) < 4) & (np.abs(x) < 38 * size) & (level < 5)
    lamina = np.abs(np.sqrt(((y - 24) / 14) ** 2 + (x / 15) ** 2) - 1) < 0.25
    canvas.hu[inside & ((lamina & (level < 13)) | arch | wings)] = rng.uniform(280, 420)
    canvas.hu[np.sqrt(((y - 23) / 9) ** 2 + (x / 10) ** 2) < 1] = 22
    bone = body < 1
    np.copyto(canvas.hu, marrow, where=bone)
    canvas.hu[bone & ((body > 0.86) | (level > period / 2 - 6.5))] = rng.uniform(330, 520)
    canvas.hu[bone & disc] = 85


def paint_organs(canvas: Canvas, build: Build, phase: Phase) -> None:
    """Liver, gall bladder, spleen, stomach and the vessels."""
    rng = canvas.rng
    inner_x, inner_y = build.width - build.fat * 1.2 - 14, build.depth - build.fat - 14
    top = float(canvas.z.min())
    texture = 4 * canvas.rough
    liver_z = top + rng.uniform(-35, 25)
    box, field = canvas.ellipsoid(
        (liver_z, -8, -0.42 * inner_x),
        (rng.uniform(80, 120), 0.85 * inner_y, 0.62 * inner_x),
        rotation(rng.uniform(-0.3, 0.1), rng.uniform(0.15, 0.5), 0),
        0.07,
    )
    liver = field < 1
    canvas.fill(box, liver, phase.liver + rng.uniform(-12, 10) + texture[box])
    veins = liver & (np.abs(np.sin(canvas.x[box] / 13 + canvas.rough[box] * 1.4)) < 0.09)
    canvas.fill(box, veins & (canvas.rough[box] > 0), phase.vein)
    if rng.random() < 0.7:
        box, field = canvas.ellipsoid(
            (liver_z + 60, -0.45 * inner_y, -0.35 * inner_x), (26, 16, 13), rough=0.08
        )
        canvas.fill(box, field < 1, rng.uniform(4, 18))
    centre = (top + rng.uniform(0, 40), 0.28 * inner_y, 0.66 * inner_x)
    box, field = canvas.ellipsoid(
        centre, (rng.uniform(38, 62), 40, 25), rotation(rng.uniform(0.2, 0.6), -0.2, 0.2), 0.09
    )
    canvas.fill(box, field < 1, phase.spleen + rng.uniform(-8, 8) + texture[box])
    paint_loop(
        canvas, (top + rng.uniform(0, 30), -0.35 * inner_y, 0.35 * inner_x), (40, 34, 44), "mixed"
    )


def paint_bowel(canvas: Canvas, build: Build) -> None:
    """Small bowel in front, colon at both sides."""
    rng = canvas.rng
    inner_x, inner_y = build.width - build.fat * 1.2 - 14, build.depth - build.fat - 14
    low, high = float(canvas.z.min()), float(canvas.z.max())
    contents = rng.choice(["fluid", "contrast"], p=[0.65, 0.35])
    for _ in range(int(rng.integers(20, 34))):
        angle = rng.uniform(np.pi, 2 * np.pi)
        reach = rng.uniform(0.2, 0.85)
        centre = (
            rng.uniform(low + 15, high + 10),
            reach * inner_y * np.sin(angle) * 0.9 + rng.uniform(-5, 18),
            reach * inner_x * np.cos(angle),
        )
        radii = (rng.uniform(9, 24), rng.uniform(9, 18), rng.uniform(11, 30))
        kind = rng.choice([contents, "mixed", "empty"], p=[0.5, 0.2, 0.3])
        paint_loop(canvas, centre, radii, str(kind))
    for side in (-1, 1):
        centre = (high - rng.uniform(0, 40), rng.uniform(0, 22), side * 0.8 * inner_x)
        paint_loop(canvas, centre, (rng.uniform(60, 90), 20, 19), "stool")


def paint_loop(canvas: Canvas, centre: Point, radii: Point, contents: str) -> None:
    """A bowel loop: wall, and fluid, contrast medium, gas over fluid, or stool within."""
    rng = canvas.rng
    turn = rotation(rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5))
    box, field = canvas.ellipsoid(centre, radii, turn, 0.2)
    wall = 1 - 2.5 / min(radii)
    canvas.fill(box, field < 1, rng.uniform(35, 85))
    inner = field < wall
    if contents == "contrast":
        canvas.fill(box, inner, rng.uniform(160, 320))
    elif contents != "empty":
        canvas.fill(box, inner, rng.uniform(5, 32))
    if contents == "stool":
        canvas.fill(box, inner, 20 + 60 * np.sin(3 * canvas.rough[box] + canvas.z[box] / 4))
    if contents in ("mixed", "stool"):
        surface = rng.uniform(-0.6, 0.3) * radii[1]
        canvas.fill(box, inner & (canvas.y[box] - centre[1] < surface), -880)


def paint_vessels(canvas: Canvas, build: Build, phase: Phase) -> None:
    """Aorta with calcified plaques, vena cava, mesenteric vessels."""
    rng = canvas.rng
    y0, x0 = build.spine
    z = canvas.z
    for side, radius, hu in (
        (1, rng.uniform(8.5, 13), phase.artery),
        (-1, rng.uniform(9, 14), phase.vein),
    ):
        sway = np.float32(rng.uniform(-5, 5)) * np.sin(z * np.float32(np.pi / rng.uniform(90, 180)))
        y = (canvas.y - (y0 - 22 - radius)) / (radius * (1 if side > 0 else rng.uniform(0.6, 1)))
        x = (canvas.x - x0 - side * rng.uniform(8, 16) - sway) / radius
        field = np.sqrt(y * y + x * x)
        canvas.hu[field < 1] = hu + rng.uniform(-8, 8)
        if side > 0 and rng.random() < 0.5:
            canvas.hu[(np.abs(field - 1) < 0.15) & (canvas.rough > 1.2)] = 600
    for _ in range(int(rng.integers(8, 16))):
        centre = (rng.uniform(-60, 60), rng.uniform(-50, 15), rng.uniform(-70, 70))
        box, field = canvas.ellipsoid(
            centre, (rng.uniform(5, 30), 3.2, rng.uniform(3, 7)), rotation(0.5, 0.3, 0.4), 0.2
        )
        canvas.fill(box, field < 1, rng.choice([phase.artery * 0.8, phase.vein * 0.9]))
