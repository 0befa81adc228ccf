"""Cells as the grid's command writes them, with figures that can be followed by hand."""

from __future__ import annotations

from typing import Any


def cell(
    middle: float | None,
    seed: int = 0,
    *,
    name: str = "",
    mode: str = "federated",
    varied: dict[str, Any] | None = None,
    wire: dict[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One run whose kidneys are 0.2 above and tumours 0.2 below the mean, at two sites."""
    kidney, tumour = (None, None) if middle is None else (middle + 0.2, middle - 0.2)
    site = {"kidney": kidney, "tumour": tumour, "mean": middle}
    worst = {**site, "mean": None if middle is None else middle - 0.1}
    found = {
        "name": name,
        "seed": seed,
        "mode": mode,
        "varied": varied or {},
        "parameters": 161584,
        "seconds": 41.2,
        "mean": site,
        "sites": {"A": site, "B": worst},
        "federation": {"method": "flap", "rank": 8, "rounds": 4, "sites_per_round": 0},
        "engine": "process",
        "versions": {"flap_nvflare": "0.1.0", "torch": "2.13.0", "python": "3.12.3"},
        "data": {"kind": "kits", "sites": 2},
        **more,
    }
    if mode == "federated":
        found["wire"] = wire or WIRE
    return found


WIRE = {"up": 600_000, "down": 400_000, "full": 6_000_000, "error": 0.0223, "seconds": 0.02}
