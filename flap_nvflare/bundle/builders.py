"""What the bundle's configs make with functions of this package instead of MONAI classes."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_nvflare.data.cases import is_synthetic
from flap_nvflare.settings import (
    BUNDLE_VARIABLE,
    CHECKPOINT_VARIABLE,
    DATA_VARIABLE,
    HARDWARE,
    OWN_NETWORK,
    SOURCE_VARIABLE,
    Federation,
    MissingDataError,
    OtherBaseError,
    Site,
    switch,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flap_nvflare.sam.network import Network
    from flap_nvflare.sam.runtime import Runtime
    from flap_nvflare.sam.tuning import Parts

logger = logging.getLogger(__name__)


def make_federation(profile: str = "auto", **values: Any) -> Federation:
    """The profile's settings, changed by every value that is not None.

    Raises:
        SettingsError: on an unknown name or a value out of range.
    """
    changes = {name: value for name, value in values.items() if value is not None}
    return Federation.of_profile(profile, changes)


def make_site(
    name: str | int,
    data_root: str | Path | None,
    checkpoint: str | None = None,
    checkpoint_sha256: str = "",
    device: str = "auto",
    checkpointing: str | bool = "auto",
    channels_last: str | bool = "auto",
    packed: str | bool = "auto",
    compile: str | bool = "auto",
    data_source: str | Path | None = None,
    bundle: str | Path | None = None,
) -> Site:
    """A site's disk; what is None comes from the environment.

    Raises:
        SettingsError: if there is no folder with scans.
    """
    root = data_root if data_root is not None else os.environ.get(DATA_VARIABLE, "")
    if str(root) == "":
        raise MissingDataError(
            f"site {name} has no data: give --data_root FOLDER or set {DATA_VARIABLE}"
        )
    source = data_source if data_source is not None else os.environ.get(SOURCE_VARIABLE, "")
    return Site(
        name=str(name),
        data_root=Path(root),
        synthetic=is_synthetic(Path(root)),
        checkpoint=str(checkpoint or os.environ.get(CHECKPOINT_VARIABLE, "")),
        checkpoint_sha256=str(checkpoint_sha256),
        bundle=Path(bundle) if bundle is not None else bundle_file(),
        device=str(device),
        checkpointing=switch(checkpointing),
        channels_last=switch(channels_last),
        packed=switch(packed),
        compile=switch(compile),
        data_source=Path(source) if str(source) else None,
    )


def bundle_file() -> Path | None:
    """The config of one's own network that the environment names; None if it names none."""
    named = os.environ.get(BUNDLE_VARIABLE, "")
    return Path(named) if named else None


def make_parts(federation: Federation) -> Parts:
    """What trains at a site and what travels, by the method and by what the rule needs.

    Raises:
        ValueError: if there is no such rule, or it does not go with the method.
    """
    from flap_nvflare.aggregation import card
    from flap_nvflare.sam.tuning import Parts

    rule = card(federation.rule)
    return Parts(
        federation.method,
        rule.trains,
        rule.private,
        federation.personal,
        offset=rule.offset,
        parameters=federation.parameters,
    )


def make_network(federation: Federation, site: Site) -> Network:
    """The network on the site's base model.

    Raises:
        OtherBaseError: if the site accepts only another base.
        CheckpointError, SettingsError: if its files do not give the network that is asked for.
    """
    own = federation.arch == OWN_NETWORK
    network = _own_network(federation, site) if own else _segmenter(federation, site)
    pinned = site.checkpoint_sha256.lower()
    if pinned and network.base_sha256 != pinned:
        raise OtherBaseError(
            f"site {site.name} accepts only the base with SHA-256 {pinned}, but "
            f"{base_of(federation, site)} has {network.base_sha256}; give the right file, or "
            f"change checkpoint_sha256"
        )
    return network


def base_of(federation: Federation, site: Site) -> str:
    """The file that the base comes from, or in a word where there is none, for messages."""
    file = site.bundle if federation.arch == OWN_NETWORK else site.checkpoint
    return str(file or federation.base)


def _own_network(federation: Federation, site: Site) -> Network:
    from flap_nvflare.bundle.own_network import build_own_network, require_logits

    network = build_own_network(federation, site.bundle, make_parts(federation))
    require_logits(network, base_of(federation, site))
    return network


def _segmenter(federation: Federation, site: Site) -> Network:
    from flap_nvflare.sam.segmenter import build_segmenter

    parts = make_parts(federation)
    network = build_segmenter(
        arch=federation.arch,
        image_size=federation.image_size,
        classes=federation.classes,
        method=federation.method,
        rank=federation.rank_of(site.name),
        seed=federation.seed,
        checkpoint=site.checkpoint or None,
        base=federation.base,
        lora_blocks=federation.lora_blocks,
        parts=parts,
    )
    if parts.offset:  # before `place` keeps it in fewer bits
        network.keep_base()
    return network


def first_adapter(federation: Federation, site: Site) -> dict[str, Tensor]:
    """The shared adapter before the first round, which server and sites draw alike.

    Raises:
        SettingsError: if the site accepts only another base.
    """
    # At the federation's rank, whatever the site's own.
    network = make_network(dataclasses.replace(federation, site_ranks={}), site)
    return shared_tensors(network, make_parts(federation))


def shared_tensors(network: Network, parts: Parts) -> dict[str, Tensor]:
    """Copies in float32 of all that trains and travels in any round, sorted by name."""
    return {
        name: parameter.detach().float().clone()
        for name, parameter in sorted(network.named_parameters())
        if parts.up(name)
    }


def make_runtime(
    network: Network, federation: Federation, site: Site, device: torch.device
) -> Runtime:
    """How the site's hardware runs the network, as chosen by the site; says so in the log."""
    from flap_nvflare.sam.runtime import choose

    runtime = choose(
        network,
        device,
        federation.precision,
        -(-federation.batch_size // site.processes),
        **{name: getattr(site, name) for name in HARDWARE},
    )
    logger.info("site %s: the network runs on %s", site.name, runtime)
    return runtime
