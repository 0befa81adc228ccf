from __future__ import annotations

import json

import pytest

from flap_nvflare.adapter.ledger import Ledger


def filled() -> Ledger:
    ledger = Ledger()
    for round_index in (0, 1):
        for site, up in (("b", 10), ("a", 7)):
            ledger.add(round_index, site, "down", 5)
            ledger.add(round_index, site, "up", up)
    ledger.add(1, "a", "up", 100)
    return ledger


def test_bytes_add_up_by_round_site_and_direction() -> None:
    ledger = filled()
    assert ledger.bytes(1, "a", "up") == 107
    assert ledger.bytes(2, "a", "up") == ledger.bytes(1, "c", "up") == 0
    assert ledger.round_bytes(0, "up") == 17
    assert ledger.round_bytes(1, "up") == 117
    assert ledger.site_bytes("b", "up") == 20
    assert ledger.total("up") == 134
    assert ledger.total("down") == 20


def test_plain_data_go_through_json_and_back_in_a_fixed_order() -> None:
    values = filled().to_dict()
    assert Ledger.from_dict(json.loads(json.dumps(values))).to_dict() == values
    places = [(row["round"], row["site"], row["direction"]) for row in values["rows"]]
    assert places == sorted(places)


@pytest.mark.parametrize(("direction", "count"), [("sideways", 1), ("up", -1)])
def test_bad_entries_are_refused(direction: str, count: int) -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="expected"):
        ledger.add(0, "a", direction, count)
    assert ledger.to_dict() == {"rows": []}


@pytest.mark.parametrize("values", [{}, {"rows": None}, {"rows": [{"round": 0}]}, []])
def test_what_is_no_ledger_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="no ledger"):
        Ledger.from_dict(values)  # type: ignore[arg-type]
