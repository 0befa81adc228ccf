"""A trained adapter put back on its base: the network that prediction, evaluation and export use.

The adapter's file says itself with which settings it was made. The base comes from the user's disk
and must have the SHA-256 that the file names.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flap_nvflare.adapter.parcel import parcel
from flap_nvflare.adapter.update import UpdateError, UpdateSpec, load_update
from flap_nvflare.bundle.builders import base_of, bundle_file, make_network, make_parts
from flap_nvflare.sam import tuning
from flap_nvflare.settings import (
    CHECKPOINT_VARIABLE,
    OWN_NETWORK,
    Federation,
    OtherBaseError,
    SettingsError,
    Site,
)

if TYPE_CHECKING:
    from flap_nvflare.sam.network import Network
    from flap_nvflare.sam.segmenter import Segmenter

SETTINGS = "federation"  # key of the settings in an adapter file's metadata
BEST_FILE, LAST_FILE = "adapter_best.safetensors", "adapter_last.safetensors"


@dataclass(frozen=True)
class Trained:
    """A network with a trained adapter on it.

    Attributes:
        network: the network on the CPU in float32, its adapter not merged, in evaluation mode.
        federation: the settings that the adapter was made with, at the file's own rank.
        spec: what the file says of its tensors.
        file: the adapter's file.
        extra: what else its metadata hold, such as `rounds` or `score`.
    """

    network: Network
    federation: Federation
    spec: UpdateSpec
    file: Path
    extra: dict[str, Any]

    @property
    def segmenter(self) -> Segmenter:
        """The network, for what knows only SAM.

        Raises:
            SettingsError: if it is a site's own network.
        """
        return sam_only(self.network, self.file)


def sam_only(network: Network, file: Path | str) -> Segmenter:
    """The network itself.

    Raises:
        SettingsError: if it is no SAM; `file` is what it belongs to.
    """
    from flap_nvflare.sam.segmenter import Segmenter

    if not isinstance(network, Segmenter):
        raise SettingsError(f"{file}: is of a network of one's own; only SAM's can be written so")
    return network


def adapter_file(path: Path | str) -> Path:
    """The file that `path` names: a file, or a run's folder, whose best adapter counts.

    Raises:
        UpdateError: if there is none.
    """
    path = Path(path)
    found = path / BEST_FILE if path.is_dir() else path
    if not found.is_file():
        last = path / LAST_FILE
        mend = (
            f"an unfinished run has {last}" if last.is_file() else "name an adapter's file or a run"
        )
        raise UpdateError(f"{found}: there is no such adapter; {mend}")
    return found


def load_trained(path: Path | str, checkpoint: Path | str = "", sha256: str = "") -> Trained:
    """Builds the network of an adapter's file.

    Args:
        path: the file, or the folder of a run.
        checkpoint: file of SAM's weights; empty as in `weights_file`. Of another network
            FLAP_BUNDLE_NETWORK names the config.
        sha256: the only base accepted; empty for the one that the file names.

    Raises:
        UpdateError: if the file is missing, damaged, sealed, or holds no settings.
        OtherBaseError: if the base has another SHA-256 than the adapter was trained on.
        CheckpointError: if SAM's weights are missing or no SAM.
    """
    file = adapter_file(path)
    tensors, spec, extra = load_update(file)
    said = _said(file, extra)
    try:
        federation = Federation.from_dict(said.pop(SETTINGS))
    except (KeyError, TypeError, AttributeError) as error:
        raise UpdateError(
            f"{file}: its metadata hold no settings to build the network with; name an adapter "
            "that a run or a site's own training has written"
        ) from error
    except SettingsError as error:
        raise UpdateError(f"{file}: {error}; its settings are another version's") from error
    federation = dataclasses.replace(federation, rank=spec.rank, site_ranks={})
    weights = weights_file(federation, checkpoint)
    site = Site(file.stem, Path(), checkpoint=weights, bundle=bundle_file())
    network = make_network(federation, site)
    if sha256 and sha256.lower() != spec.base_sha256:
        raise OtherBaseError(
            f"{file}: was trained on the base with SHA-256 {spec.base_sha256}, but only "
            f"{sha256.lower()} is accepted; use an adapter of that base"
        )
    if network.base_sha256 != spec.base_sha256:
        raise OtherBaseError(
            f"{file}: was trained on the base with SHA-256 {spec.base_sha256}, but "
            f"{base_of(federation, site)} has {network.base_sha256}; give the right file of "
            "weights"
        )
    put_on(network, federation, file, tensors)
    return Trained(network.eval(), federation, spec, file, said)


def weights_file(federation: Federation, checkpoint: Path | str = "") -> str:
    """The file of SAM's weights: the one given, else FLAP_SAM_CHECKPOINT's where one is needed.

    The packaged ViT-T, a random base and another network than SAM need none.
    """
    if str(checkpoint) or federation.base == "random" or federation.arch in ("vit_t", OWN_NETWORK):
        return str(checkpoint)
    return os.environ.get(CHECKPOINT_VARIABLE, "")


def _said(file: Path, extra: Mapping[str, str]) -> dict[str, Any]:
    try:
        return {key: json.loads(value) for key, value in extra.items()}
    except json.JSONDecodeError as error:
        raise UpdateError(f"{file}: a value in its metadata is no JSON ({error})") from error


def put_on(
    network: Network, federation: Federation, file: Path, tensors: Mapping[str, Tensor]
) -> None:
    """Puts every tensor of an adapter's file in its place, a change of the base included.

    Args:
        network: built with the settings.
        federation: the settings that the file was made with.
        file: named in errors.
        tensors: what the file holds.

    Raises:
        UpdateError: if one has no place, another shape or is of the frozen base, or one that is
            trained is missing.
    """
    adapter, offset, _ = parcel(dict(tensors))
    places, parts = dict(network.named_parameters()), make_parts(federation)
    trained = tuning.trainable(network, parts)
    for name, tensor in adapter.items():
        if name not in places:
            raise UpdateError(
                f"{file}: {name} is no part of the network; an adapter of an encrypted run can be "
                "used only where its key is"
            )
        if tensor.shape != places[name].shape:
            raise UpdateError(
                f"{file}: {name} is {tuple(tensor.shape)}, the network's is "
                f"{tuple(places[name].shape)}; the file's settings and tensors disagree"
            )
        if name not in trained and not parts.fixed(name):
            raise UpdateError(
                f"{file}: {name} is part of the frozen base, which no adapter changes; use the "
                "file that a run has written"
            )
        places[name].data.copy_(tensor)
    for name in sorted(trained.keys() - adapter.keys()):
        raise UpdateError(
            f"{file}: {name} is missing; of a run with personal parts only a site has a whole "
            "adapter"
        )
    network.set_offset(offset)
