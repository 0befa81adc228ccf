"""Another network than SAM: the one that a site's own MONAI config names.

The file is trusted code from the site's own disk (`bundle` in `flap_site.yaml`, `--bundle`, or
FLAP_BUNDLE_NETWORK); any config of a MONAI Bundle will do. Two of its items are read, with what
they refer to:

    network_def:                # takes (N, 3, S, S), gives (N, C+1, S, S) logits
      _target_: monai.networks.nets.BasicUNet
      spatial_dims: 2
      in_channels: 3
      out_channels: "$@federation.classes + 1"
    weights: /models/unet.pt    # its state dict, for base: pretrained

What trains and travels, the federation's `parameters` name; all else is the frozen base.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flap_nvflare.adapter.update import content_sha256
from flap_nvflare.bundle.workflow import innermost
from flap_nvflare.sam import tuning
from flap_nvflare.sam.checkpoint import CheckpointError, MissingCheckpointError, load_tensors
from flap_nvflare.sam.network import Network
from flap_nvflare.sam.tuning import Parts
from flap_nvflare.settings import BUNDLE_VARIABLE, Federation, SettingsError
from flap_nvflare.training.seeds import derive_seed

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

NETWORK = "network_def"
WEIGHTS = "weights"


class OwnNetwork(Network):
    """A network of any class; its parameters keep their own names.

    Running statistics of norms are part of the frozen base: they are used and never changed.

    Args:
        network: takes (N, 3, S, S), gives logits (N, C+1, S, S).
        image_size: S.
        classes: C.
    """

    def __init__(self, network: nn.Module, image_size: int, classes: int) -> None:
        super().__init__(image_size, classes)
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Class logits (N, C+1, S, S) of images (N, 3, S, S)."""
        if self.channels_last:
            image = image.to(memory_format=torch.channels_last)
        logits: Tensor = self.network(image)
        return logits

    def train(self, mode: bool = True) -> OwnNetwork:
        """As `nn.Module.train`, but for what keeps running statistics."""
        super().train(mode)
        for module in self.network.modules():
            if getattr(module, "track_running_stats", False):
                module.training = False
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's, under its own names."""
        return self.network.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The network's, under its own names."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What `state_dict` gives."""
        return self.network.load_state_dict(*args, **kwargs)


def build_own_network(federation: Federation, file: Path | None, parts: Parts) -> OwnNetwork:
    """Builds the network of a site's own file, ready to train `parts` (on the CPU).

    What the network draws comes from the federation's seed, so that all sites draw the same.

    Args:
        federation: the settings, which the file may refer to as `@federation`.
        file: the site's config; None if it names none.
        parts: what trains.

    Raises:
        MissingCheckpointError: if there is no such file, or it names no weights that are there.
        CheckpointError: if the weights are another network's.
        SettingsError: if there is no network in it, or none with such parameters.
    """
    if file is None or not file.is_file():
        raise MissingCheckpointError(
            f"{file or 'no file'}: arch bundle needs a MONAI config with {NETWORK}; name it in "
            f"'bundle' of flap_site.yaml, as --bundle, or in {BUNDLE_VARIABLE}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(federation.seed, "own network"))
        parser = _parser(federation, file)
        module = _item(parser, NETWORK)
        if not isinstance(module, nn.Module):
            raise SettingsError(f"{file}: {NETWORK} is {type(module).__name__}, no torch module")
        if federation.base == "pretrained":
            _load(module, str(_item(parser, WEIGHTS) or ""), file)
    network = OwnNetwork(module, federation.image_size, federation.classes)
    _require_named(network, federation.parameters, file)
    tuning.freeze(network, parts)
    trained = tuning.trainable(network, parts)  # no buffer is, whatever its name
    frozen = {n: t for n, t in network.state_dict().items() if n not in trained}
    network.base_sha256 = content_sha256(frozen)
    return network


@torch.no_grad()
def require_logits(network: OwnNetwork, file: str) -> None:
    """Whether one image becomes what the loss and the scores take.

    Raises:
        SettingsError: naming what it takes or gives instead.
    """
    size = network.image_size
    wanted = (1, network.classes + 1, size, size)
    network.eval()
    try:
        found = network(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError) as error:
        raise SettingsError(
            f"{file}: {NETWORK} takes no image (1, 3, {size}, {size}): {error}; give it 2 spatial "
            "dimensions and 3 input channels, or set another image_size"
        ) from error
    if not isinstance(found, Tensor) or found.shape != wanted:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise SettingsError(
            f"{file}: {NETWORK} gives {shape} for one image, expected logits {wanted}; set its "
            "output channels to the classes and the background"
        )
    network.train()


def _parser(federation: Federation, file: Path) -> ConfigParser:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(file))
    parser["federation"] = federation  # a finished object: no text of a job is parsed
    if NETWORK not in parser:
        raise SettingsError(f"{file}: has no item {NETWORK}; name the network so")
    return parser


def _item(parser: ConfigParser, name: str) -> Any:
    try:
        return parser.get_parsed_content(name) if name in parser else None
    except RuntimeError as error:
        raise innermost(error) from None


def _load(module: nn.Module, weights: str, file: Path) -> None:
    if not weights or not Path(weights).is_file():
        raise MissingCheckpointError(
            f"{file}: base pretrained needs the network's state dict; {WEIGHTS} is "
            f"{weights or 'not there'!r}: name a .pt or .safetensors file, or set base: random"
        )
    mend = f"name the state dict of {NETWORK}"
    try:
        module.load_state_dict(load_tensors(Path(weights), mend))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{weights}: {reason}; {mend}") from error


def _require_named(network: OwnNetwork, patterns: tuple[str, ...], file: Path) -> None:
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(tuning.travels("named", name, parameters=(pattern,)) for name in names):
            raise SettingsError(
                f"setting parameters: {pattern!r} names none of the {len(names)} parameters of "
                f"{file}; they are {', '.join(sorted(names)[:3])} and others"
            )
