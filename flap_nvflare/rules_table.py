"""What `flap-nvflare rules` shows: every rule's card, and its bytes at the size of the paper."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flap_nvflare.combinations import excluded

if TYPE_CHECKING:
    from flap_nvflare.aggregation import Card

_FLOAT = 4


@dataclass(frozen=True)
class Sizes:
    """Numbers of ViT-B's `flap` update by what they belong to, and what an offset may have.

    Attributes:
        head: output layers and tokens.
        a: all factors A.
        b: all factors B.
        core: an r x r matrix for every adapter.
        offset: factors of a change of full rank for every adapter, q = min(out, in).
    """

    head: int
    a: int
    b: int
    core: int
    offset: int


@dataclass(frozen=True)
class Row:
    """One rule.

    Attributes:
        up: what travels from a site, down: what travels to it.
        bytes_up: in float32 without a message's overhead, one site, one round; the mean of an
            even and an odd round where they differ.
        bytes_down: the same of what travels down, without an offset.
        bytes_down_most: what an offset can add it up to, however many rounds there are.
        excludes: settings that do not go with the rule, and why.
    """

    name: str
    paper: str
    formula: str
    up: str
    down: str
    bytes_up: int
    bytes_down: int
    bytes_down_most: int
    exact: str
    streaming: bool
    robust: bool
    linear: bool
    unequal_ranks: bool
    excludes: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def sizes(arch: str = "vit_b", image_size: int = 224, classes: int = 2, rank: int = 32) -> Sizes:
    """Counts of the method `flap`, from the network's shapes; no weights are needed or made."""
    from flap_nvflare.adapter.factors import pairs
    from flap_nvflare.sam.segmenter import blank_segmenter
    from flap_nvflare.sam.tuning import trainable

    model = blank_segmenter(arch, image_size, classes, rank, lora=True)
    shapes = {name: tuple(one.shape) for name, one in trainable(model, "flap").items()}
    numbers = {name: one.numel() for name, one in trainable(model, "flap").items()}
    found = pairs(name for name in shapes if ".lora_" in name)
    a, b = sum(numbers[pair.a] for pair in found), sum(numbers[pair.b] for pair in found)
    sides = [(shapes[pair.b][0], shapes[pair.a][1]) for pair in found]
    return Sizes(
        head=sum(numbers.values()) - a - b,
        a=a,
        b=b,
        core=len(found) * rank**2,
        offset=sum(min(side) * sum(side) for side in sides),
    )


def rows() -> list[Row]:
    """All rules, by name."""
    from flap_nvflare.aggregation import RULES

    known = sizes()
    return [_row(name, rule.CARD, known) for name, rule in sorted(RULES.items())]


def _row(name: str, card: Card, known: Sizes) -> Row:
    up, numbers_up = _travels(card, known)
    # Of `alternate` a site that missed a round lacks the factor that trained then.
    whole = card.trains == "alternate"
    down, numbers_down = ("A, B, head", known.a + known.b) if whole else (up, numbers_up)
    bytes_down = _FLOAT * (numbers_down + known.head)
    return Row(
        name=name,
        paper=card.paper,
        formula=card.formula,
        up=up,
        down=f"{down}, offset" if card.offset else down,
        bytes_up=_FLOAT * (numbers_up + known.head),
        bytes_down=bytes_down,
        bytes_down_most=bytes_down + (_FLOAT * known.offset if card.offset else 0),
        exact=card.exact,
        streaming=card.streaming,
        robust=card.robust,
        linear=card.linear,
        unequal_ranks=card.unequal_ranks,
        excludes=excluded(name),
    )


def _travels(card: Card, known: Sizes) -> tuple[str, int]:
    """What travels up, in words, and its numbers besides the head."""
    if card.trains == "core":
        return "R, head", known.core
    if card.trains == "b":
        return "B, head", known.b
    if card.trains == "alternate":
        return "B or A, head", (known.a + known.b) // 2
    if card.private == "b":
        return "A, head", known.a
    return "A, B, head", known.a + known.b
