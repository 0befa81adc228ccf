"""A thousand malformed updates: none counts, none raises, none changes what the others make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile_updates import FAULTS, HOSTILE, KINDS, SITES, Fault, Server, honest, right
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@given(
    kind=st.sampled_from(KINDS),
    faults=FAULTS,
    sender=st.sampled_from([HOSTILE, *SITES]),
    order=st.permutations([*SITES, ""]),
)
@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
def test_no_malformed_update_counts_or_changes_the_round(
    kind: str, faults: list[Fault], sender: str, order: list[str], tmp_path: Path
) -> None:
    draft = right(kind, HOSTILE)
    for fault in faults:
        fault(draft)
    server = Server(kind, tmp_path)
    for site in order:
        if site:
            assert server.accept(site, right(kind, site).message())
        else:
            assert not server.accept(sender, draft.message())
    (refusal,) = server.job.refused
    assert refusal.site == sender
    assert refusal.reason.isprintable()
    assert len(refusal.key) + len(refusal.reason) < 400
    expected, found = honest(kind), server.aggregate()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_update_counts_when_nothing_is_spoilt(kind: str, tmp_path: Path) -> None:
    server = Server(kind, tmp_path)
    assert server.accept(HOSTILE, right(kind, HOSTILE).message())
