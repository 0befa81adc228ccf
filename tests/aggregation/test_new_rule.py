"""The page beside the rules shows how to add one; what it shows must work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from aggregation_cases import equal_bits, random_sites

import flap_nvflare.aggregation as aggregation
from flap_nvflare.aggregation import AggregationError, aggregate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "flap_nvflare" / "aggregation" / "README.md").read_text(encoding="utf-8")


def test_the_rule_that_the_page_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "largest_of_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from largest_of_page import Largest

    monkeypatch.setattr(aggregation, "RULES", {**aggregation.RULES, "largest": Largest})
    sites = random_sites(4, [(4, 6, 2)])
    result = aggregate("largest", sites)
    best = max(sites, key=lambda one: one.weight)
    assert all(bool((result.tensors[name] == best.tensors[name]).all()) for name in best.tensors)
    assert equal_bits(result, aggregate("largest", sites[::-1]))
    with pytest.raises(AggregationError, match="at least one site"):
        aggregate("largest", [])
