"""The network: an image in, a map of logits for every class out, no prompts.

Parameters keep segment_anything's names, so `tuning` tells from a name alone what trains; the
adapters add theirs below the layers they adapt.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from flap_nvflare.sam import tuning
from flap_nvflare.sam.backbone import (
    Architecture,
    architecture,
    build_image_encoder,
    build_prompt_encoder,
    initialise,
)
from flap_nvflare.sam.checkpoint import PACKAGED, CheckpointError, fit_tables, read_checkpoint
from flap_nvflare.sam.decode import decode
from flap_nvflare.sam.encoder import ImageEncoder
from flap_nvflare.sam.head import FRESH, build_class_decoder, reset_head
from flap_nvflare.sam.lora import add_lora, reset_lora


class Segmenter(nn.Module):
    """SAM with C+1 class masks at full resolution.

    Attributes:
        image_encoder, prompt_encoder, mask_decoder: the parts, under SAM's own names.
        image_size: side S of the square input in pixels.
        classes: foreground classes, C.
        base_sha256: identity of the weights that training starts from.
    """

    def __init__(self, arch: Architecture, image_size: int, classes: int) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(build_image_encoder(arch, image_size))
        self.prompt_encoder = build_prompt_encoder(arch, image_size)
        self.mask_decoder = build_class_decoder(arch, classes)
        self.image_size = image_size
        self.classes = classes
        self.base_sha256 = ""

    def forward(self, image: Tensor) -> Tensor:
        """Class logits of images.

        Args:
            image: (N, 3, S, S), intensities of about zero mean and unit std.

        Returns:
            (N, C+1, S, S) float32 logits, background first; softmax over dimension 1.
        """
        if image.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"image: shape {tuple(image.shape)}; expected (N, 3, {self.image_size}, "
                f"{self.image_size})"
            )
        embedding = self.image_encoder(image)
        with torch.no_grad():  # without prompts these are constants
            positions = self.prompt_encoder.get_dense_pe()
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        sparse = embedding.new_zeros(len(image), 0, embedding.shape[1])
        return decode(self.mask_decoder, embedding, positions, sparse, dense)[0].float()


def blank_segmenter(
    arch: str | Architecture, image_size: int, classes: int, rank: int, lora: bool
) -> Segmenter:
    """The network's modules without memory (torch's meta device), with adapters if `lora`."""
    with torch.device("meta"):
        model = Segmenter(architecture(arch), image_size, classes)
        if lora:
            add_lora(model.image_encoder, model.mask_decoder, rank)
    return model


def build_segmenter(
    arch: str | Architecture,
    image_size: int,
    classes: int,
    method: str,
    rank: int,
    seed: int,
    checkpoint: str | Path | None = None,
    base: str = "pretrained",
) -> Segmenter:
    """Builds the network with its weights, ready to train under `method` (on the CPU).

    Args:
        arch: backbone, a name or sizes of one's own.
        image_size: side of the input, a multiple of the patch size.
        classes: foreground classes, C.
        method: one of `tuning.METHODS`; fixes whether there are adapters and `requires_grad`.
        rank: rank of the adapters.
        seed: of everything that no checkpoint gives. Head and adapters are drawn independently
            of the base and of each other.
        checkpoint: official file; None or "" takes the packaged ViT-T.
        base: `pretrained`, or `random` to draw all weights from the seed.

    Raises:
        CheckpointError: if the weights are missing, damaged or another model's.
        ValueError: on an unknown name or a size that does not fit.
    """
    sizes = architecture(arch)
    if base not in ("pretrained", "random"):
        raise ValueError(f"base: {base!r} is unknown; expected 'pretrained' or 'random'")
    model = blank_segmenter(sizes, image_size, classes, rank, tuning.method_named(method).lora)
    model.to_empty(device="cpu")
    if base == "random":
        initialise(model, _generator(seed, "base"))
        text = f"random arch={sizes.name} image_size={image_size} seed={seed}"
        model.base_sha256 = hashlib.sha256(text.encode()).hexdigest()
    else:
        state, model.base_sha256 = read_checkpoint(_checkpoint_path(sizes, checkpoint), sizes)
        _take_over(model, fit_tables(state, sizes, image_size))
    reset_head(model.mask_decoder, _generator(seed, "head"))
    reset_lora(model, _generator(seed, "adapter"))
    tuning.freeze(model, method)
    return model


def _checkpoint_path(arch: Architecture, checkpoint: str | Path | None) -> Path:
    if checkpoint:
        return Path(checkpoint)
    if arch.name == "vit_t":
        return PACKAGED
    raise CheckpointError(
        f"arch {arch.name}: its weights are not part of the package; download SAM's file, name it "
        "in FLAP_SAM_CHECKPOINT or in the site's `checkpoint`, or set base: random"
    )


@torch.no_grad()
def _take_over(model: Segmenter, state: dict[str, Tensor]) -> None:
    """Copies every weight that SAM gives; what remains is the fresh head and the adapters."""
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        fresh = part == "mask_decoder" and FRESH.match(rest)
        if not fresh and not name.endswith(tuning.LORA_SUFFIXES):
            tensor.copy_(state[name])


def _generator(seed: int, part: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
