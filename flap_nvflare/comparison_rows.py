"""What is compared: the rows of every table, each a way to train with its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flap_nvflare.aggregation import RULES
from flap_nvflare.attack import ATTACKS


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        mode: one of `experiment.MODES`.
        settings: changes to the federation's defaults.
        attacks: kind of attack by hostile site.
    """

    mode: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, str] = field(default_factory=dict)


# The rate of each method is the best of three on phantoms of another seed (README).
_METHODS: Mapping[str, Row] = {
    "flap": Row("federated"),
    "flap, each site alone": Row("alone"),
    "flap, pooled data": Row("pooled"),
    "flap, random base": Row("federated", {"base": "random"}),
    "full": Row("federated", {"method": "full", "learning_rate": 2e-3}),
    "lora_decoder": Row("federated", {"method": "lora_decoder", "learning_rate": 5e-3}),
    "partial_decoder": Row("federated", {"method": "partial_decoder", "learning_rate": 2e-2}),
}
_SPEED: Mapping[str, Row] = {
    "flap, last 2 blocks": Row("federated", {"lora_blocks": 2, "augment_views": 4}),
    "flap, last block": Row("federated", {"lora_blocks": 1, "augment_views": 4}),
    "flap, four views": Row("federated", {"augment_views": 4}),
    "flap, importance": Row("federated", {"loss_weighting": "importance"}),
    "flap, foreground 0.4": Row("federated", {"foreground_fraction": 0.4}),
}
_RULES: Mapping[str, Row] = {f"rule {rule}": Row("federated", {"rule": rule}) for rule in RULES}
_RANKS = {"A": 4, "B": 8, "C": 16, "D": 32, "E": 4, "F": 8}
_UNEQUAL: Mapping[str, Row] = {
    f"rule {rule}, ranks 4 to 32": Row(
        "federated", {"rule": rule, "rank": 32, "site_ranks": _RANKS}
    )
    for rule, one in RULES.items()
    if one.CARD.unequal_ranks
}
_MOMENTS: Mapping[str, Row] = {
    "svd, moments reset": Row("federated"),
    "svd, moments kept in a turned basis": Row("federated", {"moments": "keep"}),
    "svd, basis aligned": Row("federated", {"gauge": "aligned"}),
    "fedavgm, moments reset": Row("federated", {"optimizer": "fedavgm"}),
    "fedavgm, basis aligned": Row("federated", {"optimizer": "fedavgm", "gauge": "aligned"}),
}
_OPTIMIZERS: Mapping[str, Row] = {
    "fedavg": Row("federated", {"gauge": "aligned"}),
    "fedprox": Row("federated", {"gauge": "aligned", "optimizer": "fedprox"}),
    "fedprox on products": Row(
        "federated", {"gauge": "aligned", "optimizer": "fedprox", "proximal_on": "products"}
    ),
    "fednova": Row("federated", {"gauge": "aligned", "optimizer": "fednova"}),
    "scaffold": Row("federated", {"gauge": "aligned", "optimizer": "scaffold"}),
    "fedadam": Row("federated", {"gauge": "aligned", "optimizer": "fedadam", "server_rate": 0.03}),
    "ditto": Row("federated", {"gauge": "aligned", "personal": "ditto"}),
    "local heads": Row("federated", {"gauge": "aligned", "personal": "head"}),
    "3 of 6 sites a round": Row("federated", {"gauge": "aligned", "sites_per_round": 3}),
}
_WAYS: Mapping[str, tuple[str, ...]] = {
    "fp32": (),
    "int8": ("int8",),
    "int4": ("int4",),
    "sign": ("sign",),
    "top 10%, int4": ("top_k=0.1", "int4"),
    "top 10%, sign": ("top_k=0.1", "sign"),
    "top 5%, sign": ("top_k=0.05", "sign"),
}


def _coded(stages: tuple[str, ...]) -> dict[str, Any]:
    """Settings of a way: differences both ways, with error feedback at the sites."""
    if not stages:
        return {}
    return {
        "upload": ("difference", "feedback", *stages, "deflate"),
        "download": ("difference", *stages, "deflate"),
    }


_COMPRESSION: Mapping[str, Row] = {
    **{
        f"{rule}, {way}": Row("federated", {"rule": rule, **gauge, **_coded(stages)})
        for rule, gauge in (("svd", {"gauge": "aligned"}), ("ffa", {}))
        for way, stages in _WAYS.items()
    },
    # Six sites' largest twentieths, taken together, are more than a tenth: more of it goes down.
    "svd, top 5% up, top 15% down, int4": Row(
        "federated",
        {
            "gauge": "aligned",
            "upload": ("difference", "feedback", "top_k=0.05", "int4", "deflate"),
            "download": ("difference", "top_k=0.15", "int4", "deflate"),
        },
    ),
}
# One of six sites, which has a sixth of the cases, is hostile; B lies in the middle by size.
_HOSTILE: Mapping[str, Row] = {
    f"{rule}, {attack or 'nobody hostile'}": Row(
        "federated", {"rule": rule}, {"B": attack} if attack else {}
    )
    for rule in ("mean", "median", "krum")
    for attack in ("", *ATTACKS)
}
TABLES: Mapping[str, Mapping[str, Row]] = {
    "methods": _METHODS,
    "speed": _SPEED,
    "rules": _RULES,
    "ranks": _UNEQUAL,
    "moments": _MOMENTS,
    "optimizers": _OPTIMIZERS,
    "compression": _COMPRESSION,
    "hostile": _HOSTILE,
}
ROWS: Mapping[str, Row] = {name: row for rows in TABLES.values() for name, row in rows.items()}
