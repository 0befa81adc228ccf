"""Colours that the colour-blind tell apart, and dark text on light ones.

Series: Okabe and Ito's palette without its yellow and black, which vanish on white and on black.
Heat maps: viridis (matplotlib, CC0), which grows evenly in lightness.
"""

from __future__ import annotations

SERIES = 7  # colours of lines; the style sheet has them as --s0 to --s6 for light and dark pages
STEPS = 24
_VIRIDIS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)


def heat_css() -> str:
    """One class a step, h0 to h23: background, and black or white text, whichever reads better."""
    return "\n".join(
        f".h{step}{{background:rgb{colour};color:{_ink(colour)}}}".replace(" ", "")
        for step, colour in enumerate(map(heat_colour, range(STEPS)))
    )


def heat_colour(step: int) -> tuple[int, int, int]:
    """Red, green and blue of a step."""
    place = step / (STEPS - 1) * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    part = place - low
    red, green, blue = (
        round(a + (b - a) * part) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True)
    )
    return red, green, blue


def contrast(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """Contrast ratio of WCAG 2.1, 1 to 21."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _ink(colour: tuple[int, int, int]) -> str:
    white, black = (255, 255, 255), (0, 0, 0)
    return "#fff" if contrast(colour, white) >= contrast(colour, black) else "#000"


def _luminance(colour: tuple[int, int, int]) -> float:
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
