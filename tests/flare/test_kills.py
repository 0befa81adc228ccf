"""Four kills in one provisioned run, one of each kind: the same bytes at its end."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from kill_campaign import KINDS, Campaign, provisioned


@pytest.mark.provisioned
@pytest.mark.timeout(900)
def test_a_run_that_was_killed_four_times_ends_with_equal_bytes(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    campaign = Campaign(provisioned(tmp_path), random.Random(0), records.append, spread=2.0)
    try:
        campaign.federation.start()
        campaign.undisturbed()
        run = campaign.run(0, KINDS)
        assert run["problems"] == [], f"{records}\n{campaign.federation.logs()}"
    finally:
        campaign.federation.stop()
    assert run["kills"] == list(KINDS)
    assert run["status"] == "FINISHED:COMPLETED"
    assert run["equal"]
    kills = [record for record in records if "kind" in record]
    assert [one["kind"] for one in kills] == list(KINDS)
    assert any(one["saved_before"] > 0 for one in kills)  # there was something to lose
    assert all(one["saved_least"] == one["saved_before"] for one in kills)
