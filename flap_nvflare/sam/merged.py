"""The trained network without adapters: W + B A in the place of W, and the same numbers.

What rules of aggregation changed of the base is part of W already. A merged network has the plain
SAM's layers and the class head, so it takes no longer than the base and can be exported.
"""

from __future__ import annotations

from torch import Tensor

from flap_nvflare.sam.lora import LoraLinear
from flap_nvflare.sam.segmenter import Segmenter, build_segmenter
from flap_nvflare.sam.tuning import LORA_SUFFIXES


def merged_state(network: Segmenter) -> dict[str, Tensor]:
    """The state of a network without adapters that computes what `network` does.

    Returns:
        Copies in float32 on the CPU, by the names of `plain_segmenter`.
    """
    layers = {
        f"{name}.weight": layer
        for name, layer in network.named_modules()
        if isinstance(layer, LoraLinear)
    }
    return {
        name: (layers[name].merged() if name in layers else tensor).detach().cpu().float().clone()
        for name, tensor in network.state_dict().items()
        if not name.endswith(LORA_SUFFIXES)
    }


def plain_segmenter(arch: str, image_size: int, classes: int) -> Segmenter:
    """A network to load a merged state into, on the CPU, frozen, in evaluation mode.

    Until then it has random weights, the same each time.

    Args:
        arch: name of the backbone.
        image_size: side of the input in pixels, that of training.
        classes: foreground classes, C.

    Raises:
        ValueError: on an unknown name or a size that does not fit.
    """
    network = build_segmenter(arch, image_size, classes, "full", rank=1, seed=0, base="random")
    network.requires_grad_(False)
    return network.eval()


def merge(network: Segmenter) -> Segmenter:
    """A merged copy of `network`, as `plain_segmenter` makes it."""
    plain = plain_segmenter(network.arch.name, network.image_size, network.classes)
    plain.load_state_dict(merged_state(network))
    plain.base_sha256 = network.base_sha256
    return plain
