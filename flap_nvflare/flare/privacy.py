"""Differential privacy in a round: the mechanism's settings, the site's count, and what is said.

The job asks for clip and noise; how much privacy was spent is counted at the site, over all jobs
on its data, in `releases_<site>.json` of its `state_dir`. Two runs with the same seed then differ
in the noise, as they must. For an experiment that has to be repeated, a site (never the job) sets
FLAP_DP_SEED: the noise is drawn from it, protects nothing, and every report says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flap_nvflare.adapter.privacy import Mechanism, Releases
from flap_nvflare.settings import Federation, SettingsError, Site
from flap_nvflare.training.seeds import derive_seed

SEED_VARIABLE = "FLAP_DP_SEED"
_NUMBERS = ("clip", "noise", "releases", "delta", "epsilon_replace", "epsilon_zero_out")


def mechanism(federation: Federation, site: str, round_index: int) -> Mechanism | None:
    """The mechanism of a site's round; None if the federation asks for none.

    Raises:
        SettingsError: if there is noise without a clip, which bounds nothing.
    """
    if federation.dp_clip == 0:
        if federation.dp_noise > 0:
            raise SettingsError(
                f"setting dp_noise: {federation.dp_noise} needs a dp_clip above 0: what is not "
                "bounded no noise can hide"
            )
        return None
    text = os.environ.get(SEED_VARIABLE, "")
    try:
        seed = derive_seed("dp", int(text), site, round_index) if text else None
    except ValueError as error:
        raise SettingsError(f"{SEED_VARIABLE}: {text!r} is no whole number") from error
    return Mechanism(federation.dp_clip, federation.dp_noise, seed)


def release(
    federation: Federation,
    site: Site,
    round_index: int,
    start: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What may leave the site, and the report's statement about it.

    Args:
        federation: what the job asks for.
        site: where messages are counted.
        round_index: the round, from 0.
        start: what the site got from the server, by the names of `trained`.
        trained: what would leave without.

    Returns:
        The tensors, and the statement; those as trained and nothing without differential privacy.

    Raises:
        PrivacyError, SettingsError, OSError: nothing may be sent then.
    """
    here = mechanism(federation, site.name, round_index)
    if here is None:
        return dict(trained), {}
    if site.state_dir is None:
        raise SettingsError(f"site {site.name} has no state_dir to count its messages in")
    tensors = here.release(start, trained)
    counts = Releases(site.state_dir / f"releases_{site.name}.json")
    noise = here.noise if here.secret else 0.0
    counts.add(noise)  # before anything leaves
    return tensors, here.statement(counts.counts, federation.dp_delta)


def read_statement(value: Any) -> dict[str, Any]:
    """A site's statement as the server keeps it: numbers and whether the noise is secret.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, Mapping) or not set(value) <= {*_NUMBERS, "secret", "unit"}:
        raise ValueError("privacy: no statement of a mechanism")
    statement: dict[str, Any] = {}
    for name in _NUMBERS:
        number = value.get(name)
        if number is not None and (
            type(number) not in (int, float) or not 0 <= number < float("inf")
        ):
            raise ValueError(f"privacy: {name} is no number")
        statement[name] = number
    if type(value.get("secret")) is not bool:
        raise ValueError("privacy: secret is no truth value")
    return {**statement, "secret": value["secret"]}
