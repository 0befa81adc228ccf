"""Which settings of a federation exclude each other, and why.

`settings.Federation` knows what each setting may be; here is what several of them may not be
together. One table says it: `check` reads it for one federation, `excluded` for one rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flap_nvflare.settings import OWN_NETWORK, SettingsError

if TYPE_CHECKING:
    from flap_nvflare.aggregation import Card
    from flap_nvflare.settings import Federation

# As in `sam.tuning`, which needs torch: methods with adapters, and methods with output layers.
ADAPTER_METHODS = ("lora", "lora_decoder", "flap")
HEAD_METHODS = ("full", "decoder", "partial_decoder", "lora_decoder", "flap")
# Rules that make factors from products, and so have to choose a basis.
FROM_PRODUCTS = ("krum", "median", "ranked", "svd", "tail")


# Rules that have a meaning for plain tensors alone.
OF_ANY_NETWORK = ("krum", "mean", "median")


@dataclass(frozen=True)
class Exclusion:
    """Two or more settings that have no meaning together.

    Attributes:
        setting: the setting to name, with its value where only that one is meant.
        chosen: whether a federation has it.
        reason: why not.
        mend: what to set instead.
        of_rule: which rules exclude it; None if the other side is no rule.
    """

    setting: str
    chosen: Callable[[Federation], bool]
    reason: str
    mend: str
    of_rule: Callable[[str, Card], bool] | None = None


def check(federation: Federation) -> None:
    """Refuses settings that have no meaning together.

    Raises:
        SettingsError: naming the setting, the reason and the mend.
    """
    from flap_nvflare.adapter.stages import StageError, parse
    from flap_nvflare.aggregation import RULES

    for name, way in (("upload", "up"), ("download", "down")):
        try:
            parse(getattr(federation, name), way)
        except StageError as error:
            raise SettingsError(f"setting {name}: {error}") from error
    rule = federation.rule
    if rule not in RULES:
        raise SettingsError(f"setting rule: {rule!r} is not known; expected one of {tuple(RULES)}")
    for one in (*_OF_RULES, *_OF_OTHERS):
        excludes = one.of_rule is None or one.of_rule(rule, RULES[rule].CARD)
        if excludes and one.chosen(federation):
            beside = "" if one.of_rule is None else f" does not go with rule: {rule}"
            raise SettingsError(f"setting {one.setting}{beside}: {one.reason}; {one.mend}")


def excluded(rule: str) -> dict[str, str]:
    """The settings that the named rule excludes, each with its reason.

    Raises:
        AggregationError: if the rule is unknown.
    """
    from flap_nvflare.aggregation import card

    found = card(rule)
    return {
        one.setting: one.reason for one in _OF_RULES if one.of_rule and one.of_rule(rule, found)
    }


def _no_adapters(federation: Federation) -> bool:
    return federation.method not in ADAPTER_METHODS


def _accelerates(federation: Federation) -> bool:
    return federation.server_rate != 1.0 or federation.optimizer in (
        "fednova",
        "scaffold",
        "fedavgm",
        "fedadam",
    )


def _private(federation: Federation) -> bool:
    return federation.dp_clip > 0 or federation.dp_noise > 0


_OF_RULES = (
    Exclusion(
        "arch: bundle",
        lambda federation: federation.arch == OWN_NETWORK,
        "it is about low-rank factors, and another network than SAM has none",
        f"choose one of {OF_ANY_NETWORK}, or a SAM backbone as arch",
        lambda rule, card: rule not in OF_ANY_NETWORK,
    ),
    Exclusion(
        f"method without adapters (all but {', '.join(ADAPTER_METHODS)})",
        _no_adapters,
        "it trains a part of an adapter, and the method has no adapters",
        f"choose one of {ADAPTER_METHODS}, or rule: svd",
        lambda rule, card: not card.pairs,
    ),
    Exclusion(
        "gauge other than balanced",
        lambda federation: federation.gauge != "balanced",
        "the rule makes no factors from products, so there is no basis to choose",
        "leave gauge at balanced",
        lambda rule, card: rule not in FROM_PRODUCTS,
    ),
    Exclusion(
        "energy below 1",
        lambda federation: federation.energy < 1,
        "the rule sends no residual that could be cut by its energy",
        "leave energy at 1, or choose a rule that sends an offset",
        lambda rule, card: not card.offset,
    ),
    Exclusion(
        "encryption: he",
        lambda federation: federation.encryption == "he",
        "the server sees encrypted sums only, and the rule is not linear in what the sites send",
        "choose a linear rule (flap-nvflare rules), or encryption: none",
        lambda rule, card: not card.linear,
    ),
    Exclusion(
        "site_ranks",
        lambda federation: bool(federation.site_ranks),
        "the rule needs adapters of one rank",
        "leave site_ranks empty, or choose a rule with unequal ranks (flap-nvflare rules)",
        lambda rule, card: not card.unequal_ranks,
    ),
    Exclusion(
        "optimizer: fednova, scaffold, fedavgm, fedadam, or server_rate other than 1",
        _accelerates,
        "the adapter starts afresh in every round, so there is nothing to accelerate",
        "choose optimizer: fedavg or fedprox with server_rate: 1",
        lambda rule, card: rule == "stack",
    ),
    Exclusion(
        "optimizer: scaffold",
        lambda federation: federation.optimizer == "scaffold",
        "its controls would correct one factor with what was measured while the other trained",
        "choose optimizer: fedprox, or another rule",
        lambda rule, card: card.trains == "alternate",
    ),
    Exclusion(
        "optimizer: scaffold",
        lambda federation: federation.optimizer == "scaffold",
        "the mean of the controls has no bound, so a hostile site would steer all others by it",
        "choose another optimizer, or a rule that is not robust",
        lambda rule, card: card.robust,
    ),
    Exclusion(
        "optimizer: fedavgm, fedadam, or server_rate other than 1",
        lambda federation: (
            federation.optimizer in ("fedavgm", "fedadam") or federation.server_rate != 1.0
        ),
        "what the rule keeps of the part that was cut belongs to the factors before that step",
        "choose optimizer: fedavg with server_rate: 1",
        lambda rule, card: rule in ("residual", "tail"),
    ),
    Exclusion(
        "optimizer: fednova",
        lambda federation: federation.optimizer == "fednova",
        "what the rule keeps of the part that was cut belongs to the factors before that step",
        "choose optimizer: fedavg",
        lambda rule, card: rule == "tail",
    ),
    Exclusion(
        "optimizer: fednova",
        lambda federation: federation.optimizer == "fednova",
        "its weights divide by the steps that a site claims, and its scale moves the result past "
        "the rule's bound",
        "choose optimizer: fedavg, or a rule that is not robust",
        lambda rule, card: card.robust,
    ),
    Exclusion(
        "download: difference",
        lambda federation: "difference" in federation.download,
        "the adapter is drawn afresh in every round, so the last one says nothing about it",
        "take difference out of download",
        lambda rule, card: rule == "stack",
    ),
    Exclusion(
        "encryption: he",
        lambda federation: federation.encryption == "he",
        "a round's sum holds one factor, and the server can't join it with the other one, which "
        "it can't read",
        "choose rule: ffa, core or mean",
        lambda rule, card: card.trains == "alternate",
    ),
    Exclusion(
        "personal: ditto",
        lambda federation: federation.personal == "ditto",
        "the base moves under the site's own adapter in every round",
        "choose personal: none or head, or another rule",
        lambda rule, card: rule == "stack",
    ),
    Exclusion(
        "personal: ditto",
        lambda federation: federation.personal == "ditto",
        "each site has a B of its own already, so there is no shared adapter to be pulled to",
        "choose personal: none or head",
        lambda rule, card: bool(card.private),
    ),
)

_OF_OTHERS = (
    Exclusion(
        "site_ranks with a method without adapters",
        lambda federation: bool(federation.site_ranks) and _no_adapters(federation),
        "what trains has no rank",
        f"leave site_ranks empty, or choose one of {ADAPTER_METHODS}",
    ),
    Exclusion(
        "proximal_on: products with a method without adapters",
        lambda federation: federation.proximal_on == "products" and _no_adapters(federation),
        "there are no products B A",
        f"choose proximal_on: factors, or one of {ADAPTER_METHODS}",
    ),
    Exclusion(
        "gauge other than balanced with a method without adapters",
        lambda federation: federation.gauge != "balanced" and _no_adapters(federation),
        "there are no factors that could have a basis",
        f"leave gauge at balanced, or choose one of {ADAPTER_METHODS}",
    ),
    Exclusion(
        "site_ranks with gauge: aligned",
        lambda federation: bool(federation.site_ranks) and federation.gauge == "aligned",
        "a site of small rank takes the first directions, and only the balanced gauge has the "
        "strongest first",
        "choose gauge: balanced",
    ),
    Exclusion(
        "personal: ditto with proximal_on: factors",
        lambda federation: (
            federation.personal == "ditto"
            and federation.proximal_on == "factors"
            and federation.gauge != "aligned"
            and federation.rule in FROM_PRODUCTS
        ),
        "the rule turns the shared factors in every round, the site's own stay in their basis",
        "choose proximal_on: products, or gauge: aligned",
    ),
    Exclusion(
        "site_ranks with optimizer: scaffold",
        lambda federation: bool(federation.site_ranks) and federation.optimizer == "scaffold",
        "controls of different shapes have no mean",
        "leave site_ranks empty, or choose another optimizer",
    ),
    Exclusion(
        "encryption: he with upload or download",
        lambda federation: (
            federation.encryption == "he" and bool(federation.upload or federation.download)
        ),
        "ciphertexts can be added only as they are; what is coded or compressed has no sum",
        "leave upload and download empty",
    ),
    Exclusion(
        "encryption: he with cross_site: all",
        lambda federation: federation.encryption == "he" and federation.cross_site == "all",
        "all sites have the key, so a site's own adapter would be open to all others",
        "choose cross_site: global",
    ),
    Exclusion(
        "encryption: he with site_ranks",
        lambda federation: federation.encryption == "he" and bool(federation.site_ranks),
        "ciphertexts of adapters of different ranks have no sum",
        "leave site_ranks empty",
    ),
    Exclusion(
        "encryption: he with optimizer or server_rate",
        lambda federation: (
            federation.encryption == "he"
            and (federation.optimizer not in ("fedavg", "fedprox") or federation.server_rate != 1.0)
        ),
        "the server can't step with what it can't read",
        "choose optimizer: fedavg or fedprox with server_rate: 1",
    ),
    Exclusion(
        "dp_noise without dp_clip",
        lambda federation: federation.dp_noise > 0 and federation.dp_clip == 0,
        "the noise is a multiple of the largest norm, and nothing bounds that",
        "set dp_clip above 0",
    ),
    Exclusion(
        "optimizer: scaffold with dp_clip or dp_noise",
        lambda federation: federation.optimizer == "scaffold" and _private(federation),
        "a site's control is a second vector that would leave it without noise",
        "choose another optimizer, or dp_clip: 0 and dp_noise: 0",
    ),
    Exclusion(
        "personal: head with a method without output layers",
        lambda federation: federation.personal == "head" and federation.method not in HEAD_METHODS,
        "no head trains that a site could keep",
        f"choose one of {HEAD_METHODS}, or personal: none",
    ),
    Exclusion(
        "sites_per_round below min_sites",
        lambda federation: 0 < federation.sites_per_round < federation.min_sites,
        "fewer sites are drawn for a round than must answer for it to stand",
        "raise sites_per_round or lower min_sites",
    ),
)
