"""A synthetic head of tissues, from the vertex to the neck; label 1 is the brain.

The brain holds its ventricles; the fluid around it, spinal cord, eyes and muscles are not part of
it. Millimetres from the middle of the scan: z to the feet, y to the back, x to the left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flap_nvflare.data.canvas import rotation
from flap_nvflare.data.mr import Tissue, TissueCanvas

BRAIN = 1
_MIDDLE = -16.0  # z of the middle of the cranium
_EVERYWHERE = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Head:
    """Measures of one patient.

    Attributes:
        size: of the head over a usual one.
        scalp, skull: thickness in mm.
        age: 0 young to 1 old: the ventricles and furrows are wide in old heads.
        depth: (S, H, W) float32, mm below the skin of the cranium, negative outside.
    """

    size: float
    scalp: float
    skull: float
    age: float
    depth: np.ndarray


def paint_head(canvas: TissueCanvas) -> None:
    """Paints and labels everything, from outside to inside."""
    head = _paint_outside(canvas)
    _paint_face(canvas, head)
    _paint_neck(canvas, head)
    _paint_brain(canvas, head)
    _paint_deep(canvas, head)
    _paint_hindbrain(canvas, head)


def _paint_outside(canvas: TissueCanvas) -> Head:
    """Skin, scalp with muscles at the temples, skull with marrow, fluid within."""
    rng = canvas.rng
    size = float(rng.uniform(0.94, 1.05))
    wide, long, high = size * rng.uniform(72, 79), size * rng.uniform(90, 98), size * 80
    z, y, x = canvas.z - np.float32(_MIDDLE), canvas.y, canvas.x
    power = np.float32(rng.uniform(2.05, 2.4))
    radius = np.sqrt(z * z + y * y + x * x)
    # Narrower in front than behind, as heads are.
    broad = wide * (1 + 0.08 * np.clip(y / long, -1, 1))
    norm = (np.abs(x / broad) ** power + np.abs(y / long) ** power + np.abs(z / high) ** power) ** (
        1 / power
    )
    depth = (radius * (1 / np.maximum(norm, 1e-3) - 1)).astype(np.float32)
    head = Head(size, rng.uniform(4.5, 8.5), rng.uniform(5.5, 8.5), float(rng.uniform()), depth)
    jaw = _ellipsoid(canvas, (46, -34, 0), (64, 52, 54), size)
    nape = np.sqrt((y - 14) ** 2 / (56 * size) ** 2 + x**2 / (54 * size) ** 2)
    nape = np.where(canvas.z > 14, nape, 2.0)
    body = (depth > 0) | (jaw < 1) | (nape < 1)
    canvas.tissue[body] = Tissue.FAT
    canvas.tissue[body & (depth < 2) & (jaw > 0.96) & (nape > 0.96)] = Tissue.SKIN
    temple = (np.abs(x) > 0.55 * wide) & (canvas.z > -25) & (y < 25) & (depth > 2.5)
    canvas.tissue[temple & (depth < head.scalp + 1.5)] = Tissue.MUSCLE
    bone = depth > head.scalp + 0.6 * canvas.rough
    canvas.tissue[bone] = Tissue.BONE
    middle = np.abs(depth - head.scalp - 0.5 * head.skull)
    canvas.tissue[bone & (middle < 0.24 * head.skull + 0.5 * canvas.rough)] = Tissue.MARROW
    canvas.tissue[depth > head.scalp + head.skull] = Tissue.FLUID
    return head


def _paint_face(canvas: TissueCanvas, head: Head) -> None:
    """Skull base, sinuses, nose, orbits with eyes and muscles, jaw, tongue."""
    rng, size = canvas.rng, head.size
    base = _floor(canvas, head, 50.0)
    below = canvas.z > base + 2
    canvas.tissue[below & (head.depth > head.scalp + 1)] = Tissue.MUSCLE
    fat = below & (head.depth > head.scalp + 1) & (canvas.noise((8, 18, 18), 1.0) > 0.75)
    canvas.tissue[fat] = Tissue.FAT
    floor = below & (canvas.z < base + 9) & (head.depth > head.scalp)
    canvas.tissue[floor] = Tissue.BONE
    canvas.tissue[floor & (canvas.rough > 0.4)] = Tissue.MARROW
    for side in (-1, 1):
        eye = (20 * size, -66 * size, side * 32 * size)
        canvas.blob((eye[0], -52 * size, 27 * side * size), (16, 27, 17), Tissue.FAT, rough=0.05)
        canvas.blob(eye, (12.5, 12.5, 12.5), Tissue.WALL, rough=0.0)
        canvas.blob(eye, (11, 11, 11), Tissue.FLUID, rough=0.0)
        turn = rotation(side * 0.3, 0, 0)
        for up, across in ((-10, 0), (10, 0), (0, -11), (0, 11), (0, 0)):
            place = (eye[0] + up, -44 * size, (26 + across) * side * size)
            canvas.blob(place, (2.6, 19, 2.4), Tissue.MUSCLE, turn, 0.0)
        canvas.blob((46, -52 * size, side * 24), (18, 17, 14), Tissue.BONE, rough=0.05)
        canvas.blob((46, -52 * size, side * 24), (15, 15, 12), Tissue.AIR, rough=0.1)
        canvas.blob((42, 18, side * 52 * size), (15, 14, 11), Tissue.BONE, rough=0.25)
        canvas.blob((44, 22, side * 54 * size), (8, 9, 6), Tissue.AIR, rough=0.4)
        canvas.blob((62, -10, side * 46 * size), (26, 20, 8), Tissue.MUSCLE, rough=0.1)
        canvas.blob((58, 2, side * 52 * size), (18, 15, 9), Tissue.GLAND, rough=0.15)
        jaw = rotation(side * -0.35, 0, 0)
        canvas.blob((78, -34, side * 36 * size), (16, 32, 6), Tissue.BONE, jaw, 0.05)
        canvas.blob((78, -34, side * 36 * size), (10, 28, 3), Tissue.MARROW, jaw, 0.05)
    canvas.blob((20, -34 * size, 0), (11, 14, 13), Tissue.AIR, rough=0.15)
    canvas.blob((34, -60 * size, 0), (20, 24, 9), Tissue.AIR, rough=0.3)
    canvas.blob((36, -60 * size, 0), (20, 22, 1.6), Tissue.WALL, rough=0.0)
    if rng.random() < 0.7:
        place = (2, -84 * size, rng.uniform(-5, 5))
        box, field = canvas.ellipsoid(place, (12, 7, 20), None, 0.25)
        bony = np.abs(head.depth[box] - head.scalp - 0.5 * head.skull) < 0.5 * head.skull
        canvas.paint(box, (field < 1) & bony, Tissue.AIR)
    canvas.blob((80, -36, 0), (16, 28, 22), Tissue.MUSCLE, rough=0.08)


def _paint_neck(canvas: TissueCanvas, head: Head) -> None:
    """Muscles of the nape, first vertebrae with cord, airway, vessels."""
    low = canvas.z > 44
    y, x = canvas.y, canvas.x
    for side in (-1, 1):
        nape = np.sqrt(((y - 44) / 17) ** 2 + ((x - side * 24) / 23) ** 2) + 0.07 * canvas.rough
        canvas.tissue[low & (nape < 1)] = Tissue.MUSCLE
        strap = np.sqrt(((y - 16) / 12) ** 2 + ((x - side * 46) / 8) ** 2)
        canvas.tissue[low & (strap < 1)] = Tissue.MUSCLE
        for place, radius in ((4, 3.2), (-4, 4.0)):
            vessel = np.hypot(y - place, x - side * 32) < radius
            canvas.tissue[low & vessel] = Tissue.FLOW
    seam = low & (np.abs(x) < 2) & (y > 26)
    canvas.tissue[seam & (canvas.tissue == Tissue.MUSCLE)] = Tissue.FAT
    ring = np.sqrt((y - 14) ** 2 / 19**2 + x**2 / 24**2)
    canvas.tissue[low & (ring < 1)] = Tissue.BONE
    canvas.tissue[low & (ring < 0.88)] = Tissue.MARROW
    canvas.tissue[low & (np.hypot(y - 20, x) < 12)] = Tissue.BONE
    canvas.tissue[(canvas.z > 38) & (np.hypot(y - 20, x) < 10.5)] = Tissue.FLUID
    canvas.tissue[(canvas.z > 38) & (np.hypot((y - 20) * 1.2, x) < 6)] = Tissue.WHITE
    airway = np.sqrt(((y + 16) / 8) ** 2 + (x / 13) ** 2)
    canvas.tissue[(canvas.z > 40) & (airway < 1 + 0.2 * canvas.rough)] = Tissue.AIR


def _floor(canvas: TissueCanvas, head: Head, behind: float) -> np.ndarray:
    """z (mm) of a floor: high over the eyes, lower under the temples, `behind` at the back."""
    front, middle = 6.0, 24.0

    def step(y: float, width: float) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-(canvas.y - np.float32(y)) / np.float32(width))))

    height = front + (middle - front) * step(-38 * head.size, 3.0)
    height += (behind - middle) * step(4, 5.0) - 0.0012 * canvas.x**2
    return np.asarray(head.size * (height + 1.5 * canvas.rough), dtype=np.float32)


def _paint_brain(canvas: TissueCanvas, head: Head) -> None:
    """The hemispheres: cortex folded over white matter, furrows and fissures with fluid."""
    rng = canvas.rng
    gap = 1.5 + 3.0 * head.age
    below = head.depth - head.scalp - head.skull - gap
    deep = np.minimum(below, _floor(canvas, head, 26.0) - canvas.z)
    # The stem and the fluid in front of it come through the middle of the base.
    stem = np.hypot(canvas.x / 15, (canvas.y + 2) / 20) < 1 + 0.1 * canvas.rough
    hemispheres = (deep > 0) & ~((canvas.z > 11) & stem)
    fold = canvas.noise((12, 22, 22), 1.0)
    ribbon = 3.5 + 9.0 * np.abs(fold)
    canvas.label[hemispheres] = BRAIN
    canvas.tissue[hemispheres] = Tissue.GREY
    canvas.tissue[hemispheres & (deep > ribbon)] = Tissue.WHITE
    wide = 0.14 + 0.16 * head.age
    furrow = hemispheres & (np.abs(canvas.noise((12, 22, 22), 1.0)) < wide)
    canvas.tissue[furrow & (deep < rng.uniform(11, 17))] = Tissue.FLUID
    off = np.abs(canvas.x - 1.2 * canvas.rough)
    midline = hemispheres & ((canvas.z < -34) | (np.abs(canvas.y) > 46))
    canvas.tissue[midline & (off < 4.5)] = Tissue.GREY
    canvas.tissue[midline & (off < 1.2 + 1.5 * head.age)] = Tissue.FLUID
    for side in (-1, 1):
        turn = rotation(0, side * 0.2, 0.35)
        centre = (2, -10, side * 52 * head.size)
        box, field = canvas.ellipsoid(centre, (3.0 + 3 * head.age, 26, 15), turn, 0.2)
        canvas.paint(box, (field < 1) & (canvas.label[box] == BRAIN), Tissue.FLUID)


def _paint_deep(canvas: TissueCanvas, head: Head) -> None:
    """Grey nuclei, ventricles, corpus callosum."""
    rng, size = canvas.rng, head.size
    wide = 0.75 + 0.95 * head.age
    canvas.blob((-20, -2, 0), (6, 36, 22), Tissue.WHITE, rough=0.05)
    for side in (-1, 1):
        for centre, radii in (
            ((0, 8, 10), (11, 15, 8)),
            ((-10, -20, 13), (9, 12, 6)),
            ((0, -6, 26), (10, 18, 6.5)),
        ):
            place = (centre[0], centre[1] * size, side * centre[2] * size)
            canvas.blob(place, radii, Tissue.GREY, rotation(0.12 * side, 0, 0), 0.08)
        lean = rotation(side * rng.uniform(0.1, 0.22), 0, 0.25)
        front = (-16, -14 * size, side * 9 * size)
        canvas.blob(front, (6.5 * wide, 24, 4.6 * wide), Tissue.FLUID, lean, 0.1)
        back = (-8, 32 * size, side * 21 * size)
        canvas.blob(back, (7 * wide, 22, 5 * wide), Tissue.FLUID, rotation(-side * 0.3, 0, 0), 0.15)
        horn = (14, -2, side * 33 * size)
        canvas.blob(horn, (3.2 * wide, 15, 3 * wide), Tissue.FLUID, rough=0.15)
    canvas.blob((0, 2, 0), (13, 14, 1.2 + 1.4 * wide), Tissue.FLUID, rough=0.1)


def _paint_hindbrain(canvas: TissueCanvas, head: Head) -> None:
    """Cerebellum with its leaves, brain stem, fourth ventricle; fluid around them."""
    size = head.size
    inside = head.depth > head.scalp + head.skull + 1
    box, around = canvas.ellipsoid((30, 34 * size, 0), (25, 36, 50 * size), None, 0.04)
    canvas.paint(box, (around < 1) & (canvas.label[box] == 0) & inside[box], Tissue.FLUID)
    for side in (-1, 1):
        centre = (31, 38 * size, side * 22 * size)
        box, field = canvas.ellipsoid(centre, (20, 29, 25 * size), None, 0.06)
        mask = (field < 1) & inside[box]
        leaves = np.sin(canvas.z[box] * 0.85 + 2.0 * canvas.rough[box] + 0.12 * canvas.y[box])
        canvas.paint(box, mask, Tissue.GREY)
        canvas.paint(box, mask & ((field < 0.5) | ((leaves > 0.5) & (field < 0.85))), Tissue.WHITE)
        canvas.paint(box, mask & (leaves < -0.9) & (field > 0.55), Tissue.FLUID)
        canvas.mark(box, mask, BRAIN)
    for centre, radii in (((8, 6, 0), (14, 13, 19)), ((27, 4, 0), (15, 15, 17))):
        box, mask = canvas.blob(centre, radii, Tissue.WHITE, rough=0.04)
        canvas.mark(box, mask, BRAIN)
    box, mask = canvas.blob((44, 16, 0), (15, 9, 9), Tissue.WHITE, rotation(0, 0, 0.3), 0.03)
    canvas.mark(box, mask & (canvas.z[box] < 50), BRAIN)
    canvas.blob((30, 21, 0), (10, 4, 6), Tissue.FLUID, rough=0.1)


def _ellipsoid(
    canvas: TissueCanvas, centre: tuple[float, ...], radii: tuple[float, ...], size: float
) -> np.ndarray:
    """Field of an ellipsoid in the whole volume, the measures times `size`."""
    z, y, x = canvas.offsets(_EVERYWHERE, [size * value for value in centre])
    a, b, c = (np.float32(size * value) for value in radii)
    return np.sqrt((z / a) ** 2 + (y / b) ** 2 + (x / c) ** 2)
