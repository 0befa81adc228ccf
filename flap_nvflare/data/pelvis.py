"""A synthetic male pelvis of tissues from the bladder to the perineum; labels are the prostate's.

The field of view ends within the hips, as in scans of the prostate. Millimetres from the middle of
the scan: z to the feet, y to the back, x to the left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flap_nvflare.data.canvas import Box, rotation
from flap_nvflare.data.mr import Tissue, TissueCanvas

PERIPHERAL, CENTRAL = 1, 2


@dataclass(frozen=True)
class Gland:
    """Place and shape of a prostate.

    Attributes:
        centre: mm, (z, y, x).
        radii: half height, half depth, half width, mm.
        rectum: (y, x) of the rectum's middle behind it, mm.
        rectum_radii: half depth and half width of the rectum, mm.
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    rectum: tuple[float, float]
    rectum_radii: tuple[float, float]


def paint_pelvis(canvas: TissueCanvas, coil: bool) -> tuple[float, float, float]:
    """Paints and labels everything; with a `coil` a balloon fills the rectum.

    Returns:
        Where an endorectal coil lies, or would: (z, y, x) in mm.
    """
    gland = _place(canvas.rng, coil)
    _paint_wall(canvas)
    _paint_bones(canvas)
    _paint_floor(canvas, gland)
    _paint_bladder(canvas, gland)
    _paint_rectum(canvas, gland, coil)
    _paint_gland(canvas, gland)
    _paint_around(canvas, gland)
    return (gland.centre[0] + 4, gland.rectum[0] - 0.6 * gland.rectum_radii[0], gland.rectum[1])


def _place(rng: np.random.Generator, coil: bool) -> Gland:
    """A gland of 15 to 90 ml; a balloon behind it makes it flat and broad."""
    size = float(rng.uniform(0.85, 1.25))
    radii = [size * rng.uniform(18, 22), size * rng.uniform(14, 17), size * rng.uniform(22, 26)]
    if coil:
        radii[1] *= 0.8
        radii[2] *= 1.08
        depth, width = rng.uniform(17, 21), rng.uniform(20, 25)
    else:
        depth, width = rng.uniform(8, 14), rng.uniform(11, 19)
    centre = (rng.uniform(2, 10), rng.uniform(-6, 4), rng.uniform(-4, 4))
    behind = centre[1] + radii[1] + depth + rng.uniform(0, 3)
    return Gland(
        (float(centre[0]), float(centre[1]), float(centre[2])),
        (float(radii[0]), float(radii[1]), float(radii[2])),
        (float(behind), float(centre[2] + rng.uniform(-5, 5))),
        (float(depth), float(width)),
    )


def _paint_wall(canvas: TissueCanvas) -> None:
    """Fat with strands, the skin in front and behind, muscles of the wall and the buttocks."""
    rng = canvas.rng
    z, y, x = canvas.z, canvas.y, canvas.x
    front = rng.uniform(-92, -74) + 0.0012 * x * x
    back = rng.uniform(88, 104) - 0.0009 * x * x
    inside = (y > front) & (y < back)
    canvas.tissue[inside] = Tissue.FAT
    skin = inside & ((y < front + 2.5) | (y > back - 2.5))
    strands = np.abs(canvas.noise((6, 16, 16), 1.0)) < 0.03
    canvas.tissue[inside & strands] = Tissue.WALL
    canvas.tissue[skin] = Tissue.SKIN
    for side in (-1, 1):
        rectus = np.hypot((y - front - rng.uniform(14, 22)) / 6, (x - side * 19) / 18)
        canvas.tissue[(rectus < 1 + 0.1 * canvas.rough) & (z < 4)] = Tissue.MUSCLE
    for side in (-1, 1):
        lean = rotation(side * 0.55, 0, 0)
        buttock = (6, 66, side * 58)
        canvas.blob(buttock, (90, 23, 48), Tissue.MUSCLE, lean, 0.1)
        thigh = (26, -44, side * 62)
        canvas.blob(thigh, (60, 18, 26), Tissue.MUSCLE, rotation(side * 0.3, 0, 0), 0.12)
        for place in ((-54, 46), (-50, 58)):
            vessel = np.hypot(y - place[0] - 0.2 * z, x - side * place[1]) < rng.uniform(4, 6)
            canvas.tissue[vessel] = Tissue.FLOW if place[1] == 58 else Tissue.VEIN
    seams = np.abs(np.sin(x / 7 + 1.4 * canvas.rough)) < 0.06
    canvas.tissue[(canvas.tissue == Tissue.MUSCLE) & seams] = Tissue.FAT


def _paint_bones(canvas: TissueCanvas) -> None:
    """Hip bones with the heads of the thighs, pubic symphysis, sacrum and coccyx."""
    rng = canvas.rng
    for side in (-1, 1):
        reach = rng.uniform(78, 86)
        for centre, radii, turn in (
            ((-20, 2, side * reach), (34, 26, 15), rotation(side * 0.15, 0, 0)),  # acetabulum
            ((26, 22, side * 0.78 * reach), (34, 20, 11), rotation(side * -0.3, 0, 0)),  # ischium
            ((16, -48, side * 24), (17, 9, 23), rotation(side * 0.5, 0, 0)),  # pubis
            ((4, -34, side * 50), (12, 9, 24), rotation(side * 0.6, 0, 0)),  # its upper branch
        ):
            _bone(canvas, centre, radii, turn)
        _bone(canvas, (-22, -2, side * (reach + 22)), (24, 23, 23), None)
    joint = (np.abs(canvas.x) < 2.5) & (np.abs(canvas.z - 16) < 16) & (np.abs(canvas.y + 49) < 10)
    canvas.tissue[joint] = Tissue.WALL
    low = rng.uniform(62, 72)
    _bone(canvas, (-36, low + 4, 0), (32, 10, 26), rotation(0, 0, 0.35))
    _bone(canvas, (4, low, 0), (18, 6, 8), rotation(0, 0, -0.5))


def _bone(
    canvas: TissueCanvas,
    centre: tuple[float, float, float],
    radii: tuple[float, float, float],
    turn: np.ndarray | None,
) -> None:
    """Marrow within a dark cortex of about 2 mm."""
    box, field = canvas.ellipsoid(centre, radii, turn, 0.1)
    canvas.paint(box, field < 1, Tissue.BONE)
    canvas.paint(box, field < 1 - 2.4 / min(radii), Tissue.MARROW)


def _paint_floor(canvas: TissueCanvas, gland: Gland) -> None:
    """Obturator muscles along the bones, levator beside the gland, bulb of the penis below."""
    rng = canvas.rng
    for side in (-1, 1):
        canvas.blob((10, -4, side * rng.uniform(54, 60)), (50, 36, 12), Tissue.MUSCLE, None, 0.1)
        away = gland.radii[2] + rng.uniform(5, 8)
        z, y, x = canvas.z, canvas.y, canvas.x
        sling = np.abs(x - side * (away - 0.12 * (z - gland.centre[0])) - gland.centre[2])
        long = (y > gland.centre[1] - 12) & (y < gland.rectum[0] + 4) & (z > -14)
        canvas.tissue[long & (sling < 2.6 + 0.5 * canvas.rough)] = Tissue.MUSCLE
    low = gland.centre[0] + gland.radii[0] + 12
    canvas.blob((low, gland.centre[1] + 2, 0), (9, 9, 22), Tissue.MUSCLE, rough=0.1)
    canvas.blob((low + 12, gland.centre[1], 0), (10, 11, 13), Tissue.VESICLE, rough=0.1)


def _paint_bladder(canvas: TissueCanvas, gland: Gland) -> None:
    """The bladder over the gland, seminal vesicles behind it."""
    rng = canvas.rng
    top = gland.centre[0] - gland.radii[0]
    height, depth, width = rng.uniform(20, 32), rng.uniform(18, 27), rng.uniform(24, 38)
    centre = (top - 0.72 * height, gland.centre[1] - 8, gland.centre[2])
    box, field = canvas.ellipsoid(centre, (height, depth, width), None, 0.07)
    canvas.paint(box, field < 1 + 3.5 / depth, Tissue.WALL)
    canvas.paint(box, field < 1, Tissue.FLUID)
    for side in (-1, 1):
        place = (top - 2, gland.centre[1] + 0.75 * gland.radii[1], side * 17 + gland.centre[2])
        turn = rotation(side * -0.25, side * 0.3, 0)
        box, field = canvas.ellipsoid(place, (9, 6.5, 17), turn, 0.15)
        free = canvas.tissue[box] == Tissue.FAT
        canvas.paint(box, (field < 1) & free, Tissue.WALL)
        tubes = np.sin(canvas.x[box] * 0.8 + canvas.z[box] * 0.5 + 2 * canvas.rough[box]) > -0.3
        canvas.paint(box, (field < 0.9) & free & tubes, Tissue.VESICLE)


def _paint_rectum(canvas: TissueCanvas, gland: Gland, coil: bool) -> None:
    """Its wall, and within a balloon with a coil, gas, stool, or little of anything."""
    rng = canvas.rng
    y0, x0 = gland.rectum
    depth, width = gland.rectum_radii
    z = canvas.z
    sway = 0.0 if coil else rng.uniform(-0.08, 0.08)
    y = canvas.y - np.float32(y0) - 0.004 * (z - np.float32(gland.centre[0])) ** 2
    x = canvas.x - np.float32(x0) - np.float32(sway) * z
    # It narrows to the anal canal.
    narrow = 1 / (1 + np.exp((z - gland.centre[0] - gland.radii[0] - 8) / 4)) * 0.6 + 0.4
    field = np.hypot(y / (depth * narrow), x / (width * narrow)) + 0.05 * canvas.rough
    thick = (2.0 if coil else 3.5) / min(depth, width)
    canvas.tissue[field < 1 + thick] = Tissue.WALL
    canvas.tissue[field < 1] = Tissue.MUSCLE
    kind = "coil" if coil else str(rng.choice(["gas", "stool", "both", "empty"]))
    inner = field < 0.93
    if kind in ("coil", "gas"):
        canvas.tissue[inner] = Tissue.AIR
    if kind in ("stool", "both"):
        canvas.tissue[inner] = Tissue.STOOL
    if kind == "both":
        canvas.tissue[inner & (y < 0)] = Tissue.AIR
    if kind == "empty":
        canvas.tissue[field < 0.5] = Tissue.VESICLE
    if kind == "coil":
        rod = np.hypot(y + 0.5 * depth, x) < 3.5
        canvas.tissue[inner & rod] = Tissue.WALL


def _paint_gland(canvas: TissueCanvas, gland: Gland) -> None:
    """Peripheral zone round the central gland, nodules, lesions, urethra, capsule; the labels."""
    rng = canvas.rng
    high, deep, wide = gland.radii
    box = canvas.box(gland.centre, [max(gland.radii) + 8] * 3)
    rough = canvas.rough[box]
    w, v, u = canvas.offsets(box, gland.centre)
    # Broadest above its middle, pointed below; the rectum leaves a hollow behind.
    slim = 1 - 0.22 * np.clip(w / high, -0.4, 1.2)
    v = v + np.float32(0.16 * deep) * np.exp(-((u / (0.45 * wide)) ** 2)) * (v > 0)
    field = np.abs(u / (wide * slim)) ** 2.3 + np.abs(v / (deep * slim)) ** 2.1
    field = (field + np.abs(w / high) ** 2.3) ** (1 / 2.2) + 0.04 * rough
    gland_mask = (field < 1) & (canvas.tissue[box] != Tissue.AIR)
    canvas.paint(box, field < 1 + 1.5 / deep, Tissue.WALL)
    canvas.paint(box, gland_mask, Tissue.PERIPHERAL)
    canvas.mark(box, gland_mask, PERIPHERAL)
    share = float(rng.uniform(0.66, 0.92))  # of a large gland nearly all is central
    middle = (w + 0.2 * high, v + (1 - share) * 0.95 * deep, u)
    radii = (0.92 * share * high + 2, share * deep, 0.95 * share * wide)
    inner = sum((axis / np.float32(r)) ** 2 for axis, r in zip(middle, radii, strict=True))
    inner = np.sqrt(inner) + 0.05 * rough
    central = gland_mask & (inner < 1)
    canvas.paint(box, central, Tissue.WALL)
    canvas.paint(box, central & (inner < 0.93), Tissue.CENTRAL)
    canvas.mark(box, central, CENTRAL)
    anterior = gland_mask & (v < -0.72 * deep) & (np.abs(u) < 0.4 * wide)
    canvas.paint(box, anterior, Tissue.NODULE)
    _paint_nodules(canvas, gland, box, central & (inner < 0.9))
    _paint_lesions(canvas, gland, box, gland_mask & ~central)
    tube = np.hypot(u, v - 0.1 * deep) < 2.2
    canvas.paint(box, gland_mask & tube & (w > 0), Tissue.VESICLE)


def _paint_nodules(canvas: TissueCanvas, gland: Gland, box: Box, central: np.ndarray) -> None:
    """Hyperplasia: round nodules, bright ones of glands and dark ones of stroma, with a rim."""
    rng = canvas.rng
    for _ in range(int(rng.integers(4, 14))):
        radius = float(rng.uniform(2.5, 8))
        spread = rng.uniform(-0.6, 0.6, size=3) * np.asarray(gland.radii)
        w, v, u = canvas.offsets(box, np.asarray(gland.centre) + spread)
        away = np.sqrt(w * w + v * v + u * u) / radius + 0.08 * canvas.rough[box]
        kind = Tissue.PERIPHERAL if rng.random() < 0.45 else Tissue.NODULE
        canvas.paint(box, central & (away < 1), Tissue.WALL)
        canvas.paint(box, central & (away < 0.8), kind)


def _paint_lesions(canvas: TissueCanvas, gland: Gland, box: Box, zone: np.ndarray) -> None:
    """Dark lesions of the peripheral zone; they belong to it."""
    rng = canvas.rng
    for _ in range(int(rng.integers(0, 3))):
        angle = rng.uniform(0.15, 0.85) * np.pi
        spread = (
            rng.uniform(-0.5, 0.6) * gland.radii[0],
            0.8 * np.sin(angle) * gland.radii[1],
            0.85 * np.cos(angle) * gland.radii[2],
        )
        w, v, u = canvas.offsets(box, np.asarray(gland.centre) + spread)
        away = np.sqrt((w / 7) ** 2 + (v / 4) ** 2 + (u / 6) ** 2) + 0.2 * canvas.rough[box]
        canvas.paint(box, zone & (away < 1), Tissue.NODULE)


def _paint_around(canvas: TissueCanvas, gland: Gland) -> None:
    """Veins in front of and beside the gland, which are as bright as its peripheral zone."""
    rng = canvas.rng
    z0, y0, x0 = gland.centre
    high, deep, wide = gland.radii
    for _ in range(int(rng.integers(14, 26))):
        angle = rng.uniform(np.pi * 0.95, np.pi * 2.05)
        reach = rng.uniform(1.12, 1.4)
        centre = (
            z0 + rng.uniform(-0.6, 1.3) * high,
            y0 + reach * deep * np.sin(angle),
            x0 + reach * wide * np.cos(angle),
        )
        box, field = canvas.ellipsoid(centre, (rng.uniform(3, 9), 2.4, 3.2), None, 0.2)
        free = (canvas.label[box] == 0) & (canvas.tissue[box] == Tissue.FAT)
        canvas.paint(box, (field < 1) & free, Tissue.VEIN)
