"""What is done to an update before it travels: a short list of stages, chosen by the user.

`parse(["difference", "feedback", "top_k=0.15", "sign", "deflate"])` gives a `Pipeline`. The
stages only make sense in one order, so the list says which of them are used and a list in
another order is refused with the reason. An empty list sends the tensors as they are.

| stage | what it does |
|---|---|
| `difference` | sends the change since the last global adapter, which both ends hold |
| `feedback` | adds what earlier rounds lost to this round's difference (up only) |
| `top_k=<share>` | keeps this share of the update's numbers, those of largest magnitude |
| `fp16`, `int8`, `int4`, `sign` | number format of what is kept: 16, 8, 4 or 1 bit a number |
| `deflate` | zlib over the whole message |

Measured on the small SAM (161,584 numbers, 646 kB) with `feedback`, mean bits a number and bytes:
`top_k=0.15, sign, deflate` 0.79 (16 kB), `top_k=0.1, int4, deflate` 0.76 (15 kB), `top_k=0.05,
int4, deflate` 0.43 (9 kB), `sign, deflate` 1.1 (22 kB), `int4, deflate` 3.3 (66 kB). The fewer
numbers are kept, the later a small change arrives: at a share of 0.05 of steady updates half of
the numbers have been sent after 20 rounds, at 0.15 after 7.

What was lost of factors is forgotten where the rule turns their basis: with such a rule choose
the gauge `aligned`, or feedback serves the output layers alone.

Sources: error feedback with signs, Karimireddy et al. 2019 (arXiv 1901.09847); with top-k,
Stich et al. 2018 (arXiv 1809.07599); `top_k` with `sign` is the sparse ternary code of Sattler
et al. 2019 (arXiv 1903.02891).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUMBERS = ("fp16", "int8", "int4", "sign")
PLAIN = "fp32"
_TOP_K = "top_k="
_KNOWN = f"difference, feedback, {_TOP_K}<share>, {', '.join(NUMBERS)}, deflate"


class StageError(ValueError):
    """A list of stages makes no sense; the message says why and what to write instead."""


@dataclass(frozen=True)
class Pipeline:
    """The stages in use; see the module for what each does.

    Attributes:
        difference: code the change to the reference that both ends hold.
        feedback: add what was lost before.
        top_k: share of the numbers that is kept, in (0, 1); None keeps all.
        number: format of a number: `fp32`, or one of `NUMBERS`.
        deflate: zlib at the end.

    Raises:
        StageError: if the stages do not go together.
    """

    difference: bool = False
    feedback: bool = False
    top_k: float | None = None
    number: str = PLAIN
    deflate: bool = False

    def __post_init__(self) -> None:
        if self.number not in (PLAIN, *NUMBERS):
            raise StageError(f"number {self.number!r}: expected {PLAIN} or one of {NUMBERS}")
        if self.top_k is not None and not 0.0 < self.top_k < 1.0:
            raise StageError(f"top_k={self.top_k!r}: expected a share between 0 and 1, like 0.1")
        if self.top_k is not None and not self.difference:
            raise StageError(
                "top_k without difference would set most of the adapter to zero; begin the list "
                "with difference"
            )
        if self.feedback and not self.difference:
            raise StageError(
                "feedback without difference: what was lost can only be added to a difference; "
                "begin the list with difference"
            )
        if self.feedback and not self.lossy:
            raise StageError(
                f"feedback without a stage that loses anything; add {_TOP_K}<share> or one of "
                f"{NUMBERS}, or leave feedback out"
            )

    @property
    def lossy(self) -> bool:
        """Whether the receiver may hold other numbers than the sender had."""
        return self.top_k is not None or self.number != PLAIN

    @property
    def texts(self) -> tuple[str, ...]:
        """The stages as `parse` reads them."""
        stages = ["difference"] * self.difference + ["feedback"] * self.feedback
        if self.top_k is not None:
            stages.append(f"{_TOP_K}{self.top_k!r}")
        return tuple(stages + [self.number] * (self.number != PLAIN) + ["deflate"] * self.deflate)

    @property
    def whole(self) -> Pipeline:
        """How the first message goes, to a receiver that holds no reference: without loss."""
        return Pipeline(deflate=self.deflate) if self.difference else self

    def kept(self, total: int) -> int:
        """How many of `total` numbers are sent at most: at least one, if there are any."""
        return total if self.top_k is None else min(total, max(1, round(self.top_k * total)))


def parse(texts: Sequence[str], way: str = "up") -> Pipeline:
    """The pipeline that a list of stages describes.

    Args:
        texts: the stages in their order.
        way: `up` (a site's update) or `down` (the server's adapter). On the way down the next
            difference is to what the sites hold, so it holds what was lost already: `feedback`
            would add it twice and is refused.

    Raises:
        StageError: if a stage is unknown or the list makes no sense.
    """
    if isinstance(texts, str):
        raise StageError(f"stages {texts[:80]!r}: expected a list of stages, like [int8, deflate]")
    used: dict[str, str] = {}
    for text in texts:
        kind = _kind(text)
        if kind in used:
            shown = f"{used[kind]} and {text}"
            raise StageError(f"{shown}: a list holds one {kind} at most; leave one of them out")
        _check_order(kind, text, used)
        used[kind] = text
    if way == "down" and "feedback" in used:
        raise StageError(
            "feedback on the way down would count what was lost twice: the server's next "
            "difference, to what the sites hold, holds it already; leave feedback out"
        )
    share = used.get("top_k")
    return Pipeline(
        difference="difference" in used,
        feedback="feedback" in used,
        top_k=None if share is None else _share(share),
        number=used.get("number format", PLAIN),
        deflate="deflate" in used,
    )


_RANKS = {"difference": 0, "feedback": 1, "top_k": 2, "number format": 3, "deflate": 4}
_WHY = {
    "difference": "the difference is taken of the numbers as they were trained",
    "feedback": "what a stage loses is only known to a feedback that stands before it",
    "top_k": "the largest numbers are chosen before they are rounded",
    "number format": "deflate takes bytes and must be last",
}


def _kind(text: str) -> str:
    if isinstance(text, str):
        if text in NUMBERS:
            return "number format"
        if text.startswith(_TOP_K):
            return "top_k"
        if text in _RANKS and text not in ("top_k", "number format"):
            return text
    raise StageError(f"unknown stage {repr(text)[:80]}; expected {_KNOWN}")


def _check_order(kind: str, text: str, used: dict[str, str]) -> None:
    late = [other for other in used if _RANKS[other] > _RANKS[kind]]
    if "deflate" in late:
        raise StageError(f"{text} after deflate: deflate takes bytes and must be last")
    if late:
        raise StageError(f"{text} after {used[late[0]]}: {_WHY[kind]}; put {text} before it")


def _share(text: str) -> float:
    value = text.removeprefix(_TOP_K)
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0.0 < share < 1.0:
        raise StageError(f"{text[:80]}: expected a share between 0 and 1, like {_TOP_K}0.1")
    return share
