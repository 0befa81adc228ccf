"""Synthetic kidneys and what grows on them: tumours (label 2), cysts, masses beside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flap_nvflare.data.anatomy import Build, Phase
from flap_nvflare.data.canvas import Canvas, rotation, turned

KIDNEY, TUMOUR = 1, 2


@dataclass(frozen=True)
class Kidney:
    """Place and shape of one kidney.

    Attributes:
        centre: mm, (z, y, x).
        radii: half length, half width (towards the side), half thickness, mm.
        turn: (3, 3), rows are the directions of these radii.
        bend: mm by which the poles lean towards the spine.
        side: -1 right, 1 left.
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn: np.ndarray
    bend: float
    side: int


def paint_kidneys(canvas: Canvas, build: Build, phase: Phase) -> list[Kidney]:
    """Both kidneys, now and then one only, or one that lies low."""
    rng = canvas.rng
    missing = int(rng.choice([-1, 0, 1], p=[0.05, 0.9, 0.05]))
    size = rng.uniform(0.95, 1.15)
    kidneys = []
    for side in (-1, 1):
        kidney = _place(canvas, build, side, size)
        if side != missing:
            _paint(canvas, kidney, phase)
            kidneys.append(kidney)
    return kidneys


def _place(canvas: Canvas, build: Build, side: int, size: float) -> Kidney:
    rng = canvas.rng
    low = rng.uniform(25, 50) if rng.random() < 0.08 else 0.0
    room = build.width - build.fat * 1.3 - 14
    centre = (
        rng.uniform(-16, 16) + low - 5 * side,
        build.spine[0] - rng.uniform(2, 22) - 0.2 * low,
        build.spine[1] + side * min(rng.uniform(56, 76), 0.88 * room - 30),
    )
    scale = size * rng.uniform(0.9, 1.1) * (rng.uniform(0.6, 0.75) if rng.random() < 0.08 else 1)
    radii = (
        scale * rng.uniform(46, 60),
        scale * rng.uniform(24, 31),
        scale * rng.uniform(20, 26),
    )
    turn = rotation(
        side * rng.uniform(-1.0, -0.1), side * rng.uniform(0.05, 0.4), rng.uniform(-0.35, 0.1)
    )
    # Rows: length, then towards the side, then thickness.
    return Kidney(centre, radii, turn[[0, 2, 1]] * [[1], [side], [1]], rng.uniform(4, 13), side)


def _paint(canvas: Canvas, kidney: Kidney, phase: Phase) -> None:
    rng = canvas.rng
    box = canvas.box(kidney.centre, [max(kidney.radii) + 14] * 3)
    rough = canvas.rough[box]
    u, v, w = turned(canvas.offsets(box, kidney.centre), kidney.turn)
    long, wide, thick = kidney.radii
    v = v + np.float32(kidney.bend) * (u / long) ** 2
    lobes = 0.04 * np.sin(u * np.float32(rng.uniform(0.12, 0.22)) + np.float32(rng.uniform(0, 6)))
    field = np.sqrt(np.abs(u / long) ** 2.4 + (v / wide) ** 2 + (w / thick) ** 2)
    field += 0.06 * rough + lobes
    capsule = 1 + rng.uniform(0.0, 0.45)
    canvas.fill(box, (field < capsule) & (canvas.hu[box] < 130), -98 + 8 * rough)
    kidney_mask = field < 1
    spread = np.sin(u * np.float32(2 * np.pi / rng.uniform(17, 24)) + 2 * np.arctan2(w, v))
    pyramid = (field > 0.42) & (field < rng.uniform(0.74, 0.82)) & (spread > -0.35)
    texture = 3 * rough + rng.uniform(-0.08, 0.08) * phase.cortex
    canvas.fill(box, kidney_mask, phase.cortex + texture)
    canvas.fill(box, kidney_mask & pyramid, phase.medulla + texture)
    deep = rng.uniform(0.25, 0.42)
    sinus = (u / (deep * long)) ** 2 + ((v + 0.5 * wide) / (0.62 * wide)) ** 2
    sinus = np.sqrt(sinus + (w / (rng.uniform(0.25, 0.4) * thick)) ** 2) + 0.2 * rough
    hilum = (sinus < 1) & (field < 1.15)
    canvas.fill(box, hilum, rng.uniform(-80, -20))
    urine = hilum & (rough > rng.uniform(-0.3, 0.7))
    canvas.fill(box, urine, phase.pelvis)
    vessel = (np.abs(u + 4 * rough) < 4) & (np.abs(w) < 4.5) & (v < -0.3 * wide) & (v > -1.7 * wide)
    canvas.fill(box, vessel & (canvas.hu[box] < 130), phase.vein)
    canvas.mark(box, kidney_mask & ~hilum, KIDNEY)


def paint_tumour(canvas: Canvas, kidney: Kidney, phase: Phase) -> None:
    """One tumour in, on or beside the kidney: uneven, solid, necrotic or cystic."""
    rng = canvas.rng
    radius = float(rng.uniform(10, 28))  # KiTS19: about 2 to 6 cm across
    centre = _near_surface(kidney, rng, float(rng.uniform(0.55, 1.15)))
    centre = (canvas.within(centre[0], radius), *centre[1:])
    radii = radius * rng.uniform(0.8, 1.25, size=3)
    turn = rotation(*rng.uniform(-1.5, 1.5, size=3))
    box, field = canvas.ellipsoid(centre, tuple(radii), turn, float(rng.uniform(0.08, 0.22)))
    free = (canvas.hu[box] < 260) | (canvas.label[box] > 0)
    mask = (field < 1) & free & (canvas.hu[box] > -700)
    kind = rng.choice(
        ["clear", "papillary", "chromophobe", "cystic", "like kidney"],
        p=[0.4, 0.18, 0.14, 0.16, 0.12],
    )
    texture = 6 * canvas.rough[box]
    if kind == "like kidney":
        hu = phase.cortex * rng.uniform(0.8, 0.95)
    else:
        hu = phase.tumour[{"clear": 0, "papillary": 1}.get(str(kind), 2)] * rng.uniform(0.85, 1.15)
    canvas.fill(box, mask, hu + texture)
    if kind == "cystic":
        canvas.fill(box, mask & (field < rng.uniform(0.65, 0.85)), rng.uniform(8, 28))
    elif kind == "clear" and radius > 10:
        core = mask & (field < 0.75) & (canvas.rough[box] > rng.uniform(-0.5, 0.8))
        canvas.fill(box, core, rng.uniform(15, 45))
    canvas.mark(box, mask, TUMOUR)


def paint_look_alikes(canvas: Canvas, kidneys: list[Kidney], phase: Phase) -> None:
    """What is easily taken for kidney or tumour: cysts (part of the kidney), masses, loops."""
    rng = canvas.rng
    for kidney in kidneys:
        if rng.random() < 0.35:
            radius = rng.uniform(5, 15)
            centre = _near_surface(kidney, rng, rng.uniform(0.7, 1.05))
            box, field = canvas.ellipsoid(centre, (radius,) * 3, None, 0.04)
            mask = (field < 1) & (canvas.hu[box] < 260)
            canvas.fill(box, mask, rng.uniform(-2, 14))
            canvas.mark(box, mask, KIDNEY)
        if rng.random() < 0.35:
            away = (-1.25 * kidney.radii[0], -4.0, -0.25 * kidney.side * kidney.radii[1])
            _mass(canvas, np.add(kidney.centre, away), rng.uniform(5, 17), phase.tumour[1])
        if rng.random() < 0.35:
            angle = rng.uniform(0, 2 * np.pi)
            gap = kidney.radii[1] + rng.uniform(12, 22)
            away = (rng.uniform(-30, 30), -abs(gap * np.sin(angle)), gap * np.cos(angle))
            hu = rng.choice([phase.tumour[1], phase.spleen, 40.0, phase.cortex * 0.7])
            _mass(canvas, np.add(kidney.centre, away), rng.uniform(6, 15), float(hu))


def _mass(canvas: Canvas, centre: np.ndarray, radius: float, hu: float) -> None:
    """A solid mass that leaves kidneys, bones and air as they are."""
    radii = radius * canvas.rng.uniform(0.75, 1.3, size=3)
    turn = rotation(*canvas.rng.uniform(-1, 1, size=3))
    box, field = canvas.ellipsoid(tuple(centre), tuple(radii), turn, 0.15)
    free = (canvas.label[box] == 0) & (canvas.hu[box] > -700) & (canvas.hu[box] < 130)
    canvas.fill(box, (field < 1) & free, hu + 4 * canvas.rough[box])


def _near_surface(
    kidney: Kidney, rng: np.random.Generator, share: float
) -> tuple[float, float, float]:
    """A place at `share` of the way from the centre to the surface, not at the hilum."""
    direction = rng.standard_normal(3)
    direction[1] = abs(direction[1]) if rng.random() < 0.75 else direction[1]
    direction /= np.linalg.norm(direction)
    local = share * direction * kidney.radii
    local[1] -= kidney.bend * (local[0] / kidney.radii[0]) ** 2
    z, y, x = np.asarray(kidney.centre) + local @ kidney.turn
    return float(z), float(y), float(x)
