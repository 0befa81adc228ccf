"""Stand-ins for rules of every kind: a site reads a rule's card and never its formula."""

from __future__ import annotations

import pytest

from flap_nvflare import aggregation
from flap_nvflare.aggregation import Card, Rule
from flap_nvflare.aggregation.mean import Mean

CARDS = {
    "only_b": Card("", "", "yes", trains="b"),
    "by_turns": Card("", "", "yes", trains="alternate"),
    "only_core": Card("", "", "yes", trains="core"),
    "private_b": Card("", "", "yes", private="b"),
    "moves_base": Card("", "", "yes", offset=True),
}


def stand_ins() -> dict[str, Rule]:
    """All rules there are, and the mean under each of `CARDS`."""
    return {
        **aggregation.RULES,
        **{name: type(name, (Mean,), {"CARD": card}) for name, card in CARDS.items()},
    }


@pytest.fixture
def rule_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the rules of `CARDS` known for one test."""
    monkeypatch.setattr(aggregation, "RULES", stand_ins())
