"""Two kidneys, what grows on them, and what is easily taken for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flap_nvflare.data.anatomy import FAT, Build, Phase
from flap_nvflare.data.canvas import Array, Canvas, Point, Shape, radial, rotation

KIDNEY, TUMOUR = 1, 2
SMALLEST, LARGEST = 12.0, 45.0  # diameter of a tumour, mm


@dataclass(frozen=True)
class Kidney:
    """Where a kidney lies: u along it, v to its hilum, w across.

    Attributes:
        centre: (z, y, x) mm.
        radii: half axes u, v, w, mm.
        turn: (3, 3) rows u, v, w.
        bend: mm by which the poles curve to the hilum.
    """

    centre: Point
    radii: Point
    turn: Array
    bend: float

    def at(self, u: float, v: float, w: float) -> Point:
        """The place of a point given in half axes."""
        local = np.array([u * self.radii[0], v * self.radii[1], w * self.radii[2]])
        local[1] += self.bend * u * u
        z, y, x = (float(value) for value in local @ self.turn + np.array(self.centre))
        return z, y, x


def draw_kidneys(canvas: Canvas, build: Build, phase: Phase, tumours: int) -> None:
    """Kidneys with their vessels, cysts, `tumours` tumours and some distractors."""
    rng = canvas.rng
    sides = [-1, 1]
    if rng.random() < 0.07:
        sides.remove(int(rng.choice(sides)))
    kidneys = [_place(canvas, build, side, alone=len(sides) == 1) for side in sides]
    for kidney in kidneys:
        _bed(canvas, build, phase, kidney)
    for kidney in kidneys:
        _kidney(canvas, phase, kidney)
        for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.6, 0.22, 0.12, 0.06]))):
            _cyst(canvas, kidney)
    for number in range(tumours):
        _tumour(canvas, phase, kidneys[(number + int(rng.integers(2))) % len(kidneys)])


def _place(canvas: Canvas, build: Build, side: int, alone: bool) -> Kidney:
    rng = canvas.rng
    size = rng.uniform(0.84, 1.14) * (1.12 if alone else 1.0)
    radii = (size * rng.uniform(44, 54), size * rng.uniform(24, 29), size * rng.uniform(19, 25))
    z = rng.normal(0, 7) + (6 if side > 0 else -4)
    away = build.spine[1] + side * (47 + radii[1] * rng.uniform(0.55, 0.8))
    y = build.spine[0] + rng.uniform(-16, 6)
    if rng.random() < 0.1:  # low and nearer to the front
        z, y, away = z - rng.uniform(18, 34), y - rng.uniform(4, 16), away * 0.92
    limit = max(canvas.half_height - 0.55 * radii[0], 0)
    z = float(np.clip(z, -limit, limit))
    # The upper pole leans to the spine and back; the hilum looks to the middle and forwards.
    forward = rng.uniform(0.3, 1.1)
    spin = -np.pi / 2 + side * -forward if side > 0 else np.pi / 2 + forward
    turn = rotation(-side * rng.uniform(0.12, 0.42), rng.uniform(0.02, 0.35), spin)
    return Kidney((z, y, away), radii, turn, rng.uniform(4, 12))


def _bed(canvas: Canvas, build: Build, phase: Phase, kidney: Kidney) -> None:
    """The fat round a kidney, its vessels, and an adrenal gland that may hold a mass."""
    rng = canvas.rng
    slack = rng.uniform(2.5, 11)
    radii = tuple(r + slack for r in kidney.radii)
    bed = canvas.ellipsoid(kidney.centre, (radii[0], radii[1], radii[2]), kidney.turn, rough=2.5)
    canvas.paint(bed, FAT + 4, texture=10)
    middle = np.array([kidney.centre[0], build.spine[0] - 26, build.spine[1]])
    hilum = np.array(kidney.at(rng.uniform(-0.15, 0.15), 0.55, 0))
    for value, radius, shift in ((phase.aorta, 2.8, 2.0), (phase.cava, 4.8, -6.0)):
        bow = (middle + hilum) / 2 + [shift, -rng.uniform(2, 9), 0]
        path = np.stack([middle, bow, hilum]) + np.array([[shift], [0], [shift / 2]]) * [1, 0, 0]
        canvas.paint(canvas.tube(path, radius * rng.uniform(0.8, 1.25)), value)
    top = np.array(kidney.at(1.12, 0.35, -0.1))
    for _ in range(2):
        path = np.stack([top, top + rng.normal(0, 1, 3) * [8, 9, 6]])
        canvas.paint(canvas.tube(path, 2.4), phase.bowel - 5)
    if rng.random() < 0.15:
        size = rng.uniform(6, 15)
        mass = canvas.ellipsoid((top[0], top[1], top[2]), (size, size, 0.8 * size), rough=2)
        canvas.paint(mass, rng.uniform(-5, 85), texture=8)


def _kidney(canvas: Canvas, phase: Phase, kidney: Kidney) -> None:
    rng = canvas.rng
    reach = max(kidney.radii) + kidney.bend + 6
    box = canvas.box(kidney.centre, reach)
    u, v, w = canvas.local(box, kidney.centre, kidney.turn)
    v = v - np.float32(kidney.bend) * (np.square(u / np.float32(kidney.radii[0])) - 0.35)
    surface = radial((u, v, w), kidney.radii, power=2.2)
    surface += np.float32(rng.uniform(0.8, 2.0)) * canvas.coarse[box]
    length, across, thick = kidney.radii
    sinus = (
        radial(
            (u, v - 0.78 * across, w - rng.uniform(-0.15, 0.15) * thick),
            (length * rng.uniform(0.34, 0.5), across * rng.uniform(0.72, 0.95), thick * 0.42),
        )
        + 2.0 * canvas.fine[box]
    )
    body = np.maximum(surface, -sinus)
    # Pyramids: medulla below the cortex, parted by columns of cortex.
    rays = np.sin(u * np.float32(0.33) + rng.uniform(0, 6)) + 0.6 * canvas.fine[box]
    below = np.clip((-np.maximum(surface, -sinus - 4) - rng.uniform(5, 7.5)) / 2.5, 0, 1)
    share = below * np.clip(0.6 + 0.9 * rays, 0, 1)
    tissue = phase.cortex + share * (phase.medulla - phase.cortex)
    canvas.paint(Shape(box, body), tissue.astype(np.float32), KIDNEY, texture=4)
    within = np.maximum(sinus, surface + 1)
    canvas.paint(Shape(box, within), FAT + rng.uniform(0, 25), texture=14)
    pelvis = radial((u, v - 0.75 * across, w), (length * 0.2, across * 0.5, thick * 0.2))
    wet = np.maximum(pelvis + 1.5 * canvas.fine[box], -np.float32(60) + sinus)
    canvas.paint(Shape(box, wet), rng.uniform(2, 18))
    for _ in range(3):
        to = np.array(kidney.at(rng.uniform(-0.5, 0.5), 0.0, rng.uniform(-0.4, 0.4)))
        path = np.stack([np.array(kidney.at(0, 0.9, 0)), to])
        canvas.paint(_outside(canvas.tube(path, rng.uniform(1.5, 3)), canvas), phase.cava)


def _outside(shape: Shape, canvas: Canvas) -> Shape:
    """The part of a shape that is no kidney."""
    return Shape(shape.box, np.where(canvas.label[shape.box] > 0, np.float32(9), shape.distance))


def _cyst(canvas: Canvas, kidney: Kidney) -> None:
    """Water in a thin wall: part of the kidney, whatever it looks like."""
    rng = canvas.rng
    size = rng.uniform(4, 13)
    at = _on_surface(rng, kidney, rng.uniform(0.7, 1.05))
    cyst = canvas.ellipsoid(at, (size, size * rng.uniform(0.8, 1), size), rough=0.6)
    canvas.paint(cyst, rng.uniform(-2, 14), KIDNEY)


def _on_surface(rng: np.random.Generator, kidney: Kidney, out: float) -> Point:
    """A place `out` half axes from the centre, away from the hilum."""
    while True:
        way = rng.normal(0, 1, 3) * [0.8, 1, 1]
        way /= np.linalg.norm(way)
        if way[1] < 0.45:
            return kidney.at(*(out * way))


def _tumour(canvas: Canvas, phase: Phase, kidney: Kidney) -> None:
    """Solid, poorly enhancing or cystic; sunk into the kidney or hanging on it."""
    rng = canvas.rng
    size = 0.5 * float(np.exp(rng.uniform(np.log(SMALLEST + 2), np.log(LARGEST - 2))))
    out = rng.uniform(0.45, 1.0) + 0.2 * size / 20
    z, y, x = _on_surface(rng, kidney, out)
    limit = canvas.half_height - canvas.sizes[0]
    at = (float(np.clip(z, -limit, limit)), y, x)
    stretch = np.exp(rng.normal(0, 0.1, 3))
    radii = (size * stretch[0], size * stretch[1], size * stretch[2])
    turn = rotation(*rng.uniform(-1.5, 1.5, 3))
    shape = canvas.ellipsoid(at, radii, turn, rough=0.09 * size)
    ragged = Shape(shape.box, shape.distance + 0.5 * canvas.fine[shape.box])
    kind = rng.choice(["solid", "poor", "cystic"], p=[0.5, 0.28, 0.22])
    if kind == "cystic":
        canvas.paint(ragged, 0.6 * phase.tumour + 25, TUMOUR, texture=8)
        core = ragged.distance + rng.uniform(2.5, 5) + 1.5 * canvas.fine[shape.box]
        canvas.paint(Shape(shape.box, core), rng.uniform(8, 26), texture=4)
        return
    plain = 36.0
    share = rng.uniform(0.65, 1.05) if kind == "solid" else rng.uniform(0.2, 0.45)
    canvas.paint(ragged, plain + share * (phase.tumour - plain), TUMOUR, texture=rng.uniform(5, 16))
    if size > 9 and rng.random() < 0.6:  # a dead centre
        core = ragged.distance + size * rng.uniform(0.35, 0.6) + 2.5 * canvas.fine[shape.box]
        canvas.paint(Shape(shape.box, core), rng.uniform(12, 34), texture=5)
