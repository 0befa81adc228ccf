"""The network: an image in, a map of logits for every class out, no prompts.

Parameters keep segment_anything's names, so `tuning` tells from a name alone what trains; the
adapters add theirs below the layers they adapt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flap_nvflare.sam import tuning
from flap_nvflare.sam.attention import exporting
from flap_nvflare.sam.backbone import (
    Architecture,
    architecture,
    build_image_encoder,
    build_prompt_encoder,
    initialise,
)
from flap_nvflare.sam.checkpoint import (
    PACKAGED,
    MissingCheckpointError,
    fit_tables,
    read_checkpoint,
)
from flap_nvflare.sam.decode import decode
from flap_nvflare.sam.encoder import ImageEncoder
from flap_nvflare.sam.head import FRESH, build_class_decoder, reset_head
from flap_nvflare.sam.lora import add_lora, reset_lora
from flap_nvflare.sam.network import Network
from flap_nvflare.sam.offset import BaseOffset


class Segmenter(Network):
    """SAM with C+1 class masks at full resolution.

    Attributes:
        image_encoder, prompt_encoder, mask_decoder: the parts, under SAM's own names.
        arch: the backbone's sizes.
    """

    def __init__(self, arch: Architecture, image_size: int, classes: int) -> None:
        super().__init__(image_size, classes)
        self.image_encoder = ImageEncoder(build_image_encoder(arch, image_size))
        self.prompt_encoder = build_prompt_encoder(arch, image_size)
        self.mask_decoder = build_class_decoder(arch, classes)
        self.arch = arch
        self._positions: tuple[Any, Tensor] | None = None
        self._offset: BaseOffset | None = None

    @property
    def frozen_blocks(self) -> int:
        """Encoder blocks, from the first on, in which and before which nothing trains."""
        encoder = self.image_encoder
        if encoder.pos_embed.requires_grad or _trains(encoder.patch_embed):
            return 0
        blocks = list(encoder.blocks)
        return next((k for k, block in enumerate(blocks) if _trains(block)), len(blocks))

    @property
    def offset(self) -> dict[str, Tensor]:
        """The change of the frozen base that holds now, see `set_offset`."""
        return {} if self._offset is None else dict(self._offset.tensors)

    def set_offset(self, offset: Mapping[str, Tensor]) -> None:
        """Changes the frozen base under the adapters, in place of any change before.

        What comes before the first adapted block stays as it is.

        Args:
            offset: `<stem>.offset_b` (out, q) and `<stem>.offset_a` (q, in), whose product is
                added to the weights that `<stem>` adapts; empty for the base as loaded.

        Raises:
            ValueError: if it does not fit; nothing is changed then.
        """
        if offset or self._offset is not None:
            self._base_rows().set(offset)

    def keep_base(self) -> None:
        """Keeps the base under the adapters in float32, whatever precision it gets later.

        For rules that change the base; without it the base counts as `set_offset` finds it.
        """
        self._base_rows().keep()

    def _base_rows(self) -> BaseOffset:
        if self._offset is None:
            self._offset = BaseOffset(self)
        return self._offset

    @torch.no_grad()
    def prefix(self, image: Tensor) -> Tensor:
        """The tokens (N, grid, grid, width) after the frozen blocks; `forward` takes them, too."""
        return self.image_encoder.prefix(self._checked(image), self.frozen_blocks)

    def forward(self, image: Tensor) -> Tensor:
        """Class logits of images.

        Args:
            image: (N, 3, S, S), intensities of about zero mean and unit std; or in their place
                what `prefix` made of them.

        Returns:
            (N, C+1, S, S) float32 logits, background first; softmax over dimension 1.
        """
        grid = self.arch.grid(self.image_size)
        if image.shape[1:] == (grid, grid, self.arch.embed_dim):
            embedding = self.image_encoder.rest(image, self.frozen_blocks)
        else:
            embedding = self.image_encoder(self._checked(image))
        with torch.no_grad():  # without prompts a constant, too
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        # Of the shape and not of len(): a traced network takes any number of images.
        sparse = embedding.new_zeros(embedding.shape[0], 0, embedding.shape[1])
        masks, _, _ = decode(self.mask_decoder, embedding, self._place(), sparse, dense)
        return masks.float()

    def _checked(self, image: Tensor) -> Tensor:
        if image.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"image: shape {tuple(image.shape)}; expected (N, 3, {self.image_size}, "
                f"{self.image_size})"
            )
        return image.to(memory_format=torch.channels_last) if self.channels_last else image

    def _place(self) -> Tensor:
        """The dense positional encoding, (1, dim, grid, grid): made once."""
        if exporting():
            return cast(Tensor, self.prompt_encoder.get_dense_pe())
        matrix = self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        key = (id(matrix), matrix._version, matrix.device, matrix.dtype)
        if self._positions is None or self._positions[0] != key:
            # Outside inference mode, whose tensors training could not use.
            with torch.inference_mode(False), torch.no_grad():
                self._positions = key, self.prompt_encoder.get_dense_pe()
        return self._positions[1]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def blank_segmenter(
    arch: str | Architecture,
    image_size: int,
    classes: int,
    rank: int,
    lora: bool,
    lora_blocks: int = 0,
    core: bool = False,
) -> Segmenter:
    """The network's modules without memory (torch's meta device), with adapters if `lora`.

    `core` puts a matrix between the factors of each.
    """
    with torch.device("meta"):
        model = Segmenter(architecture(arch), image_size, classes)
        if lora:
            add_lora(model.image_encoder, model.mask_decoder, rank, lora_blocks, core)
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
    lora_blocks: int = 0,
    parts: tuning.Parts | None = None,
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
        lora_blocks: the encoder's last blocks that have adapters; 0 for all.
        parts: of `method`, what trains of the adapters; None for both factors.

    Raises:
        CheckpointError: if the weights are missing, damaged or another model's.
        ValueError: on an unknown name or a size that does not fit.
    """
    sizes = architecture(arch)
    if base not in ("pretrained", "random"):
        raise ValueError(f"base: {base!r} is unknown; expected 'pretrained' or 'random'")
    lora = tuning.method_named(method).lora
    parts = parts or tuning.Parts(method)
    if parts.method != method:
        raise ValueError(f"parts are of method {parts.method!r}, not of {method!r}")
    core = parts.trains == "core"
    model = blank_segmenter(sizes, image_size, classes, rank, lora, lora_blocks, core)
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
    tuning.freeze(model, parts)
    return model


def _checkpoint_path(arch: Architecture, checkpoint: str | Path | None) -> Path:
    if checkpoint:
        return Path(checkpoint)
    if arch.name == "vit_t":
        return PACKAGED
    raise MissingCheckpointError(
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
